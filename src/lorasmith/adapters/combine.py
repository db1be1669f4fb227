"""Combining adapters of one base model into a new adapter folder. The base model itself is not needed."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.adapters.combinable import Source, kept_tensors, read_sources, refuse_differences
from lorasmith.adapters.folder import NAME, AdapterFolder, metadata_text
from lorasmith.adapters.foreign import CHAT_TEMPLATE, TOKENIZER_CONFIG, VOCABULARIES
from lorasmith.adapters.output import output_folder
from lorasmith.adapters.stacks import is_expert, parameters_of, stacked
from lorasmith.config.combine import CombineConfig
from lorasmith.config.model import ModelConfig
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.loading.load import load_base
from lorasmith.lora.combine import (
    Factors,
    LayerError,
    Part,
    combine,
    layer_error,
    padded,
    parts_by_layer,
    relative_error,
)
from lorasmith.lora.expressions import ends_with
from lorasmith.lora.files import write_files
from lorasmith.lora.inject import PEFT_PREFIX
from lorasmith.report import Report

CANCELLED = 1e-6  # of the size of the first adapter: a sum that is smaller is only rounding
_TOKENIZER = (  # what other tools save beside an adapter, and lorasmith if there are added tokens
    *VOCABULARIES, CHAT_TEMPLATE, TOKENIZER_CONFIG, "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "additional_chat_templates",
)  # fmt: skip


@dataclass(frozen=True)
class Combination:
    """A combined adapter, and how far it is from the exact weighted sum of the changes of the weights.

    error: the relative Frobenius error over all layers. can_be_compared: whether one model can hold the result and all
    the adapters that it was made of.
    """

    folder: str
    method: str
    rank: int
    error: float
    layers: tuple[LayerError, ...]
    can_be_compared: bool


def combine_adapters(
    adapters: Sequence[tuple[str | Path, float]],
    output: str | Path,
    options: CombineConfig | None = None,
    model: ModelConfig | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> Combination:
    """Combine adapters of one base model, run or adapter folders with their weights, into an adapter folder `output`.

    With `model`, the adapters are also compared with this base model, which is loaded for it.

    Raises:
        RunError: `output` already exists, contains one of the adapters, or cannot be written.
        AdapterError: an adapter is broken or not plain LoRA, the adapters do not belong together or not to `model`, or
            nothing is left of them.
    """
    with output_folder(output, overwrite, "adapter") as folder:
        report, options = report or Report(), options or CombineConfig()
        sources = read_sources(adapters)
        folder.spare(source.path for source in sources)
        refuse_differences(sources, report)
        kept = kept_tensors(sources)
        combined, layers = _combined(sources, options, report)
        config, extras = _config(sources, combined), _extras(sources, options)
        tensors, rank = _tensors(combined, sources) | kept, config["r"]
        if model is not None:
            _check_base(sources, AdapterFolder(folder.path, config, None, {}, 0, tensors=tensors), model, report)

        def fill(staging: Path) -> None:
            write_files(staging, {key: tensor.contiguous() for key, tensor in tensors.items()}, config, extras)
            _copy_tokenizer(sources, staging)

        folder.write(fill)
        return Combination(
            str(folder.path), options.method, rank, relative_error(layers), tuple(layers), _can_be_compared(sources)
        )


def _combined(
    sources: Sequence[Source], options: CombineConfig, report: Report
) -> tuple[dict[str, Factors], list[LayerError]]:
    """A and B of each layer, and their errors. Raises AdapterError if the adapters cancel each other out."""
    adapters = [(source.factors, source.weight) for source in sources]
    layers, combined, errors = parts_by_layer(adapters), dict[str, Factors](), list[LayerError]()
    generator = torch.Generator().manual_seed(options.seed)
    for experts in (False, True):  # apart, because experts have a smaller rank than other layers
        for path, factors in combine(
            [({p: f for p, f in own.items() if is_expert(p) is experts}, weight) for own, weight in adapters],
            options.method,
            rank=options.rank,
            density=options.density,
            majority_sign_method=options.majority_sign_method,
            generator=generator,
        ):
            combined[path] = factors
            errors.append(layer_error(path, layers[path], factors))
            report.progress(_("combined layers"), len(combined), len(layers))
    _refuse_nothing(layers, errors, combined)
    return combined, errors


def _refuse_nothing(
    layers: Mapping[str, Sequence[Part]], errors: Sequence[LayerError], combined: Mapping[str, Factors]
) -> None:
    """Raise AdapterError if the weighted sum is zero, or nothing was left by pruning."""
    alone = [layer_error(path, parts[:1], combined[path]).norm for path, parts in layers.items()]
    is_zero = not any(factors.A_RI.any() and factors.B_OR.any() for factors in combined.values())
    if is_zero or sum(error.norm for error in errors) <= CANCELLED * sum(alone):
        raise AdapterError(
            _("Nothing is left of the adapters: they cancel each other out, or the density is too small. Choose other "
              "weights or a larger --density.")
        )  # fmt: skip


def _ranks(combined: Mapping[str, Factors]) -> tuple[int, int]:
    """The largest rank of the layers, and of the experts; 0 if there are none."""
    ranks = [(is_expert(path), factors.rank) for path, factors in combined.items()]
    layers, experts = (max((rank for kind, rank in ranks if kind is wanted), default=0) for wanted in (False, True))
    return layers, experts


def _tensors(combined: Mapping[str, Factors], sources: Sequence[Source]) -> dict[str, Tensor]:
    """A and B by PEFT's keys, those of all layers with one rank, and those of all experts."""
    tensors, (rank, of_experts) = dict[str, Tensor](), _ranks(combined)
    for path, factors in combined.items():
        if not is_expert(path):
            key, whole = f"{PEFT_PREFIX}{path}.", padded(factors, rank)
            embedding = any(f"{key}lora_embedding_A" in source.folder.tensors for source in sources)
            A, B = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
            tensors |= {key + A: whole.A_RI, key + B: whole.B_OR}
    for path, (A_stack, B_stack) in stacked({p: f for p, f in combined.items() if is_expert(p)}, of_experts).items():
        tensors |= {f"{PEFT_PREFIX}{path}.lora_A.weight": A_stack, f"{PEFT_PREFIX}{path}.lora_B.weight": B_stack}
    return tensors


def _config(sources: Sequence[Source], combined: Mapping[str, Factors]) -> dict[str, Any]:
    """The content of adapter_config.json. One rank and alpha for all layers, since some programs know only these.

    Experts have another, because they are many: with the rank of the layers, most of the file would be zeros.
    """
    (of_layers, of_experts), parameters = _ranks(combined), _parameters(sources, combined)
    rank = of_layers or of_experts
    other = {name: of_experts for name, is_stack in parameters.items() if is_stack and of_experts != rank}
    raws = [source.folder.peft_config for source in sources]
    saved = dict.fromkeys(name for source in sources for name in source.config.modules_to_save)
    indices = [raw["trainable_token_indices"] for raw in raws if raw.get("trainable_token_indices")]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": raws[0].get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": rank,  # scaling 1: weights, alphas and rsLoRA are in A and B
        "use_rslora": False,
        "rank_pattern": other,
        "alpha_pattern": other,
        "lora_dropout": 0.0 if parameters else sources[0].config.lora_dropout,
        "bias": "none",
        "target_modules": _targets(sources, combined),
        **({"target_parameters": list(parameters), "peft_version": _peft_version(sources)} if parameters else {}),
        "exclude_modules": None,
        "modules_to_save": list(saved) or None,
        "trainable_token_indices": indices[0] if indices else None,
        "init_lora_weights": True,
        "fan_in_fan_out": any(raw.get("fan_in_fan_out") for raw in raws),
        "inference_mode": True,
    }


def _parameters(sources: Sequence[Source], combined: Mapping[str, Factors]) -> dict[str, bool]:
    """What target_parameters must have, and whether it is a stack of experts, instead of the weight of a layer."""
    stacks = parameters_of(path for path in combined if is_expert(path))
    names = {name for source in sources for name in source.config.target_parameters or ()}
    layers = [f"{path}.weight" for path in combined if any(ends_with(f"{path}.weight", name) for name in names)]
    if _is_narrowed(sources):
        names = {*stacks, *layers}
    return {name: any(ends_with(path, name) for path in stacks) for name in sorted(names)}


def _peft_version(sources: Sequence[Source]) -> str | None:
    """That of the adapters with experts, because it tells how these are stored."""
    versions = (source.folder.peft_config.get("peft_version") for source in sources if parameters_of(source.factors))
    return next((version for version in versions if version), None)


def _is_narrowed(sources: Sequence[Source]) -> bool:
    """Whether an adapter does not adapt all that its names match, so that names do not say what it adapts."""
    configs = [source.config for source in sources]
    return any(
        isinstance(c.target_modules, str) or c.exclude_modules or c.layers_to_transform is not None for c in configs
    )


def _targets(sources: Sequence[Source], combined: Mapping[str, Factors]) -> list[str]:
    """Names, if every adapter gives names and nothing that narrows them down; otherwise the paths of all layers."""
    if not _is_narrowed(sources):
        return sorted({name for source in sources for name in source.config.target_modules})
    named = _parameters(sources, combined)
    return sorted(path for path in combined if not is_expert(path) and f"{path}.weight" not in named)


def _extras(sources: Sequence[Source], options: CombineConfig) -> dict[str, str]:
    """lorasmith.json with the base model and template of the first adapter that has one; nothing if none has."""
    first = next((source.folder for source in sources if source.folder.metadata), None)
    if first is None or first.metadata is None:
        return {}
    tokens = {token: i for source in sources for token, i in source.folder.added_tokens.items()}
    data = dict.fromkeys(name for source in sources for name in source.folder.notes.get("data", []))
    notes = {key: first.notes[key] for key in ("max_length", "dtype", "quantize") if key in first.notes}
    made_of = [
        {"folder": str(source.path.absolute()), "sha256": source.folder.hash, "weight": source.weight}
        for source in sources
    ]
    notes |= {"data": list(data), "combined": options.model_dump(exclude_none=True) | {"adapters": made_of}}
    return {NAME: metadata_text(first.metadata["base"], first.metadata["template"], tokens, notes)}


def _copy_tokenizer(sources: Sequence[Source], folder: Path) -> None:
    """Copy the tokenizer of the first adapter that has one in its folder, unless only that of the base model counts."""
    ours = [source for source in sources if source.folder.metadata]
    wanted = [source for source in ours if source.folder.added_tokens] if ours else sources
    for source in wanted:
        files = [source.path / name for name in _TOKENIZER if (source.path / name).exists()]
        for file in files:
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
        if files:
            return


def _check_base(sources: Sequence[Source], result: AdapterFolder, model: ModelConfig, report: Report) -> None:
    """Raise AdapterError if one of the adapters does not belong to the base model `model`."""
    base = load_base(model, report)
    for source in sources:
        source.folder.template(base)
    result.load_into(base, "combined")


def _can_be_compared(sources: Sequence[Source]) -> bool:
    """Whether the adapters and their combination can be loaded together: they have one template, and only A and B."""
    templates = [source.folder.metadata and source.folder.metadata["template"] for source in sources]
    return all(template == templates[0] for template in templates) and not any(source.kept for source in sources)
