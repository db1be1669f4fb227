"""llama.cpp with the same base model and adapters, if `llama_cpp` is installed: one request at a time.

llama.cpp uses the same adapters for a whole batch, so requests for different adapters cannot be batched. The base model
is converted to F16 and Q8_0 and the adapters to float32, as llama.cpp's own converters do.

pip install llama-cpp-python     compiles for ten minutes, for the processor at hand
"""

import ctypes
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.numpy import load_file

from lorasmith.loading.folder import find_folder
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.files import ADAPTER_WEIGHTS
from lorasmith.report import Report

KINDS = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
PREFIX = "base_model.model."


def why_not(model: str) -> str | None:
    """Why llama.cpp cannot be measured, or None if it can."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return "`llama-cpp-python` is not installed"
    kind = _config(find_folder(model, Report()))["model_type"]
    return None if kind == "llama" else f"the bench writes GGUF files for llama, not for {kind}"


def about() -> dict[str, str]:
    """The version of llama.cpp, and the instruction sets it was compiled for."""
    import llama_cpp

    return {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode().strip(" |")}


class LlamaCpp:
    """A base model in llama.cpp with its adapters."""

    def __init__(self, model: str, kind: str, folders: Sequence[Path], prompts: list[list[int]], new: int) -> None:
        import llama_cpp
        from llama_cpp._logger import set_verbose

        set_verbose(False)
        self.api = llama_cpp
        source = find_folder(model, Report())
        # memory-mapped while in use
        self.files = tempfile.TemporaryDirectory(prefix="lorasmith-gguf-")
        file = Path(self.files.name) / f"base-{kind}.gguf"
        write_base(file, source, KINDS[kind])
        self.model = llama_cpp.llama_model_load_from_file(bytes(file), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp does not read {file.name}"
        self.adapters = []
        for folder in folders:
            file = Path(self.files.name) / f"{folder.name}.gguf"
            write_adapter(file, folder, _config(source))
            self.adapters.append(llama_cpp.llama_adapter_lora_init(self.model, bytes(file)))
            assert self.adapters[-1], f"llama.cpp does not read {file.name}"
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = max(map(len, prompts)) + new
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.prompts, self.new = prompts, new

    def serial(self) -> dict[str, Any]:
        """One prompt at a time, its adapter set before."""
        start = time.perf_counter()
        replies = [self.reply(ids, i % len(self.adapters)) for i, ids in enumerate(self.prompts)]
        return {"seconds": time.perf_counter() - start, "replies": replies}

    def reply(self, prompt: list[int], adapter: int | None) -> list[int]:
        """Greedy decoding after `prompt`, with one of the adapters or none."""
        api, chosen = self.api, [] if adapter is None else [self.adapters[adapter]]
        many = len(chosen)
        pointers = (api.llama_adapter_lora_p_ctypes * many)(
            *(ctypes.cast(one, api.llama_adapter_lora_p_ctypes) for one in chosen)
        )
        assert api.llama_set_adapters_lora(self.context, pointers, many, (ctypes.c_float * many)(*[1.0] * many)) == 0
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        ids, reply = prompt, []
        for _ in range(self.new):
            tokens = (api.llama_token * len(ids))(*ids)  # the batch only points to them
            assert api.llama_decode(self.context, api.llama_batch_get_one(tokens, len(ids))) == 0
            logits = np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, -1), (self.words,))
            ids = [int(logits.argmax())]
            reply += ids
        return reply

    def agreement(self, choices: Callable[[list[int], list[int], int | None], list[int]]) -> dict[str, float]:
        """The share of its tokens that `choices` would choose at the same positions, without and with adapters."""
        found = {}
        for what in ("base", "adapters"):
            same = 0
            for i, prompt in enumerate(self.prompts[: len(self.adapters)]):
                adapter = i if what == "adapters" else None
                reply = self.reply(prompt, adapter)
                same += sum(a == b for a, b in zip(reply, choices(prompt, reply, adapter), strict=True))
            found[what] = same / len(self.adapters) / self.new
        return found

    def close(self) -> None:
        """Free its memory and delete its files."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)
        self.files.cleanup()


def write_base(file: Path, folder: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Convert a model folder to GGUF without its tokenizer: matrices in `kind`, norms in float32."""
    config = _config(folder)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, weight in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        array = _turned(module, weight, config)
        if array.ndim == 1:
            writer.add_tensor(_name(module, config), array.astype(np.float32))
        else:
            writer.add_tensor(_name(module, config), gguf.quantize(array, kind), raw_dtype=kind)
    _finish(writer)


def write_adapter(file: Path, folder: Path, config: dict[str, Any]) -> None:
    """Convert an adapter in PEFT's format to GGUF, for a base model with this `config`."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(
        gguf.Keys.Adapter.LORA_ALPHA, float(json.loads((folder / ADAPTER_CONFIG).read_text())["lora_alpha"])
    )
    for name, weight in load_file(folder / ADAPTER_WEIGHTS).items():
        module, _dot, half = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        array = _turned(module, weight, config) if half == "lora_B" else weight
        writer.add_tensor(f"{_name(module, config)}.{half.lower()}", np.ascontiguousarray(array, np.float32))
    _finish(writer)


def _turned(module: str, weight: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Reorder the rows of q and k for llama.cpp, where rotated pairs are adjacent instead of half a head apart."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    if (many := heads.get(module.rpartition(".")[2])) is None:
        return weight
    return weight.reshape(many, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _name(module: str, config: dict[str, Any]) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    found = names.get_name(module)
    assert found is not None, module
    return f"{found}.weight"


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
