"""Exporting an adapter alone to a GGUF file, for `llama.cpp --lora`.

llama.cpp adds alpha / r B A x, with one alpha for all layers and r from the shape of A.
"""

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from torch import Tensor

from lorasmith.adapters.certificate import VERSION, Export, sha256_of, versions, write_certificate
from lorasmith.adapters.merge import certify, load_plain
from lorasmith.config.model import ModelConfig
from lorasmith.errors import AdapterError, ModelError
from lorasmith.export.gguf.families import family_of, in_halves, interleaved, names_of
from lorasmith.export.gguf.file import write_gguf
from lorasmith.export.gguf.model import require_free
from lorasmith.export.gguf.subject import encoding_of
from lorasmith.export.plain_lora import PlainLora, folded
from lorasmith.export.readback.readers import LlamaCpp, has_llama_cpp
from lorasmith.i18n import _
from lorasmith.lora.combine import Factors
from lorasmith.report import Report
from lorasmith.system.locking import locked
from lorasmith.system.writing import new_file, writing
from lorasmith.version import installed_version

PROGRAM = "llama.cpp --lora"
INSTEAD = "lorasmith export RUN --to gguf"
SIDES = {"lora_a": 0, "lora_b": 1}


def export_gguf_lora(
    path: str | Path,
    output: str | Path,
    config: ModelConfig | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> Export:
    """Write the adapter of a run or adapter folder to the GGUF file `output`, in float32.

    Raises:
        RunError: `output` exists and is not to be replaced, or cannot be written.
        ModelError: the family cannot be exported.
        AdapterError: the adapter is more than A and B of linear layers, or the file is not the trained adapter.
    """
    report, config, target = report or Report(), config or ModelConfig(), Path(output).expanduser()
    with writing(target, is_run=False), locked(target.parent / f".{target.name}.lorasmith-lock", target):
        require_free(target, overwrite)
        own = PlainLora.open(path, config, report, PROGRAM, INSTEAD)
        names = _names(own)
        report.say(_("Writing {file} ({kind})", file=target, kind="f32"))
        with new_file(target) as staging:
            _write(staging, own, names, target.stem)
            error = own.require_same(target, read_factors(staging, own))
            readings = [{"reader": "gguf", "version": version("gguf"), "error": error}]
            if has_llama_cpp():
                readings.append(_ask_llama_cpp(staging, own, target))
            content = {
                "version": VERSION,
                "target": "gguf-lora",
                "sha256": sha256_of(staging),
                "type": "f32",
                "architecture": family_of(own.config).architecture,
                "figures": {"layers": len(names), "readings": readings},
                "versions": versions("gguf", "torch"),
                **own.identity,
            }
    return write_certificate(target, content)


def read_factors(file: Path, own: PlainLora) -> dict[str, Factors]:
    """The matrices in a file, by the paths of the layers of the model, with the scaling of llama.cpp's formula."""
    reader = GGUFReader(file)
    field = reader.get_field("adapter.lora.alpha")
    alpha = float(field.contents()) if field else 0.0
    tensors = {one.name: torch.from_numpy(np.array(one.data)) for one in reader.tensors}
    back = in_halves if family_of(own.config).change is interleaved else _as_it_is
    found = {}
    for path, name in _names(own).items():
        a_RI, b_OR = (tensors[f"{name}.{side}"] for side in SIDES)
        found[path] = Factors(a_RI, back(name, b_OR, own.config), alpha / len(a_RI))
    return found


def _names(own: PlainLora) -> dict[str, str]:
    """The name of each layer's weight in GGUF. Raises ModelError if there is none."""
    name_of = names_of(own.config)
    if "lm_head" in own.factors and own.config.tie_word_embeddings:
        raise ModelError(
            _(
                "lm_head: it shares its weight with the embedding, so the base model's GGUF file has no tensor for it "
                "to which {program} could add an adapter. Export the merged model instead: {instead}",
                program=PROGRAM,
                instead=INSTEAD,
            )
        )
    return {path: name_of(f"{path}.weight") for path in own.factors}


def _as_it_is(_name: str, tensor: Tensor, _config: object) -> Tensor:
    return tensor


def _write(file: Path, own: PlainLora, names: Mapping[str, str], title: str) -> None:
    """One alpha: that of all layers if it is the same, else 1; B has the rest."""
    alphas = {own_factors.scaling * own_factors.rank for own_factors in own.factors.values()}
    alpha = alphas.pop() if len(alphas) == 1 else 1.0
    family = family_of(own.config)
    mixed = family.change if family.change is interleaved else _as_it_is
    writer = GGUFWriter(file, family.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_name(title)
    writer.add_string("lorasmith.version", installed_version() or "")
    writer.add_string("lorasmith.adapter.hash", own.folder.hash)
    for path, factors in folded(own.factors, lambda one: alpha / one.rank).items():
        name = names[path]
        writer.add_tensor(f"{name}.lora_a", factors.A_RI.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", mixed(name, factors.B_OR, own.config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _ask_llama_cpp(file: Path, own: PlainLora, target: Path) -> dict[str, Any]:
    """Let llama.cpp compute the logits of the base model with this adapter. Raises AdapterError if they differ."""
    encoding = encoding_of(own.template, own.embedding_rows)
    with tempfile.TemporaryDirectory(prefix="lorasmith-base-") as place:
        base = Path(place) / "base.gguf"
        write_gguf(base, load_plain(own.base, None, torch.float32, False), encoding, "f32", {})
        reader = LlamaCpp(base, max(map(len, own.probes)), file)
        found = reader.logits(own.probes)
        reader.close()
    result = certify("", torch.float32, own.logits, [own.logits], found, False, floor=reader.floor)
    if not result.holds:
        raise AdapterError(
            _(
                "{file} is not the trained model: as {reader} reads it, with the base model, its logits differ by "
                "{error:.1e}, where {limit:.1e} is allowed. It was not written.",
                file=target,
                reader=reader.name,
                error=result.error,
                limit=result.limit,
            )
        )
    return {"reader": reader.name, "version": reader.version, "error": result.error}
