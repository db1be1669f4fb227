"""The adapters that are to be combined: read from their folders, and refused if no adapter equals their combination."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorasmith.adapters.folder import AdapterFolder, find_adapter
from lorasmith.adapters.foreign import VOCABULARIES, WHOLE, chat_template_of
from lorasmith.adapters.stacks import expert_factors, other_counts, parameters_of, places
from lorasmith.config.files import read_object
from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError
from lorasmith.i18n import _, foreign, listed
from lorasmith.lora.adapter_config import PEFT_DEFAULTS
from lorasmith.lora.combine import Factors
from lorasmith.lora.expressions import ends_with
from lorasmith.lora.files import ADAPTER_WEIGHTS, invalid_values, is_same
from lorasmith.lora.inject import PEFT_PREFIX
from lorasmith.lora.ranks import rank_and_alpha
from lorasmith.lora.token_rows import ROWS
from lorasmith.report import Report

_PAIR = re.compile(re.escape(PEFT_PREFIX) + r"(?P<path>.+)\.(lora_(?P<side>[AB])\.weight|lora_embedding_(?P<end>[AB]))")
# Options with which an adapter is still the sum of W and s B A. All others are refused, also those of later versions.
_PLAIN = {
    *PEFT_DEFAULTS, "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "modules_to_save", "trainable_token_indices", "target_parameters", "fan_in_fan_out",
    "init_lora_weights", "eva_config", "qalora_group_size", "peft_type", "task_type", "base_model_name_or_path",
    "inference_mode", "auto_mapping", "peft_version", "revision", "megatron_core", "runtime_config",
}  # fmt: skip
_UNMERGED = {"alora_invocation_tokens", "lora_bias"}  # with which most adapters cannot be merged either
# of init_lora_weights, those that leave W as it is
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class Source:
    """One of the adapters, and its weight.

    factors: A and B by the path of the layer or expert. kept: its other tensors by PEFT's keys: modules and rows that
    were trained in full, and frozen ones that PEFT saves along.
    """

    folder: AdapterFolder
    weight: float
    config: LoraConfig
    factors: Mapping[str, Factors]
    kept: Mapping[str, Tensor]

    @property
    def path(self) -> Path:
        """The adapter folder."""
        return self.folder.path

    def is_trained(self, key: str) -> bool:
        """Whether the tensor `key` of `kept` was trained, and is no copy of the base model's."""
        if key.endswith("." + ROWS):
            return True
        module = key.removeprefix(PEFT_PREFIX)
        frozen = key.endswith(WHOLE[:-1])
        names = self.config.modules_to_save
        parents = [module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)]
        return not frozen and any(ends_with(parent, name) for parent in parents for name in names)

    @property
    def template(self) -> dict[str, Any]:
        """What of its template must be the same in all adapters: not the system message, nor what follows from it."""
        if self.folder.metadata is None:
            return {"chat_template": chat_template_of(self.path)}
        stored = self.folder.metadata["template"]
        return {key: value for key, value in stored.items() if key not in ("system", "golden")}

    @property
    def tokens(self) -> dict[str, int]:
        """The tokens that were added to the vocabulary, or that another tool names as added, and their ids."""
        file = self.path / VOCABULARIES[0]
        if self.folder.metadata or not file.is_file():
            return self.folder.added_tokens
        return {token["content"]: token["id"] for token in read_object(file, AdapterError).get("added_tokens") or []}

    @property
    def system(self) -> str:
        """The system message of its template."""
        return str(self.folder.metadata["template"].get("system", "")) if self.folder.metadata else ""


def read_sources(adapters: Sequence[tuple[str | Path, float]]) -> list[Source]:
    """Read the adapters, each a run or adapter folder with its weight.

    Raises AdapterError that names every adapter that is broken or is not plain LoRA.
    """
    sources, problems = list[Source](), list[str]()
    for path, weight in adapters:
        try:
            sources.append(_read(AdapterFolder.read(find_adapter(Path(path).expanduser())), weight))
        except AdapterError as error:
            problems += error.problems
    if problems:
        raise AdapterError(*problems)
    return sources


def _read(folder: AdapterFolder, weight: float) -> Source:
    _refuse_variants(folder)
    if problems := invalid_values(folder.tensors):
        raise AdapterError(*(f"{folder.path / ADAPTER_WEIGHTS}: {problem}" for problem in problems))
    config, sides, kept = folder.config, dict[str, dict[str, Tensor]](), dict[str, Tensor]()
    for key, tensor in sorted(folder.tensors.items()):  # read in a random order, and the random masks depend on it
        if found := _PAIR.fullmatch(key):
            sides.setdefault(found["path"], {})[found["side"] or found["end"]] = tensor
        else:
            kept[key] = tensor
    factors = _factors(folder, config, sides)
    if odd := [key for key in kept if ".lora_" in key or not key.startswith(PEFT_PREFIX)]:
        raise AdapterError(
            _(
                "{path}: {key} is neither A nor B of a layer, so lorasmith cannot combine it with other adapters.",
                path=folder.path / ADAPTER_WEIGHTS,
                key=odd[0],
            )
        )
    return Source(folder, weight, config, factors, kept)


def _refuse_variants(folder: AdapterFolder) -> None:
    """Raise AdapterError if the adapter is more than B A beside each layer."""
    raw = folder.peft_config
    options = [key for key, value in raw.items() if value and key not in _PLAIN]
    if (init := raw.get("init_lora_weights", True)) not in _PLAIN_INITS and init is not None:
        options.append(f"init_lora_weights={init}")
    if raw.get("bias") not in (None, "none"):
        options.append(f"bias={raw['bias']}")
    if not options:
        return
    if not _UNMERGED.isdisjoint(options):
        raise AdapterError(
            _(
                "{folder}: trained with {options}, so its change of a layer is more than the product of B and A, and "
                "cannot be combined from these. Train it again without {options}.",
                folder=folder.path,
                options=listed(sorted(options)),
            )
        )
    raise AdapterError(
        _(
            "{folder}: trained with {options}, so its change of a layer is more than the product of B and A, and "
            "cannot be combined from these. Merge it into its base model with lorasmith merge and train the other "
            "adapters on the result, or train it again without {options}.",
            folder=folder.path,
            options=listed(sorted(options)),
        )
    )


def _factors(
    folder: AdapterFolder, config: LoraConfig, sides: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Factors]:
    """A and B of each layer and expert, with its scaling. Raises AdapterError if one is missing or has another rank."""
    try:
        parameters = {place.path: place for place in places(config, sides)}
    except AdapterError as error:
        raise AdapterError(*(f"{folder.path}: {problem}" for problem in error.problems)) from None
    factors = dict[str, Factors]()
    for path, pair in sides.items():
        place = parameters.get(path)
        r, alpha = rank_and_alpha(config, place.parameter if place else path)
        if pair.keys() == {"A", "B"} and place:
            found = expert_factors(config, place, pair["A"], pair["B"])
        elif [size for side in "AB" if side in pair for size in [pair[side].shape[side == "B"]]] == [r, r]:
            found = {path: Factors(pair["A"], pair["B"], config.scaling(r, alpha))}
        else:
            found = {}
        if not found:
            raise AdapterError(_other_rank(folder, place.parameter if place else path, r))
        factors |= found
    return factors


def _other_rank(folder: AdapterFolder, path: str, r: int) -> str:
    return _(
        "{path}: the layer {layer} does not have an A and a B of the rank that adapter_config.json gives it "
        "({rank}), so the file is incomplete or belongs to another adapter.",
        path=folder.path / ADAPTER_WEIGHTS,
        layer=path,
        rank=r,
    )


def refuse_differences(sources: Sequence[Source], report: Report) -> None:
    """Raise AdapterError if the adapters belong to different base models, templates or vocabularies.

    Warns of what cannot be compared, and of different system messages.
    """
    first = sources[0]
    problems = [text for other in sources[1:] for text in (_other_base(first, other, report),) if text]
    ours = [source for source in sources if source.folder.metadata]
    theirs = [source for source in sources if not source.folder.metadata and source.template["chat_template"]]
    problems += [
        _(
            "{first} and {other} were trained with different chat templates or stop tokens, so no one prompt suits "
            "both. Combine adapters that were trained with the same template.",
            first=group[0].path,
            other=other.path,
        )
        for group in (ours, theirs)
        for other in group[1:]
        if other.template != group[0].template
    ]
    problems += _other_tokens(sources) + other_counts([source.factors for source in sources]) + _other_storage(sources)
    if problems:
        raise AdapterError(*problems)
    if len({source.system for source in ours}) > 1:
        report.warn(
            _(
                "The adapters were trained with different system messages. The combined adapter has that of {first}; "
                "name another one first to use its message.",
                first=ours[0].path,
            )
        )
    if ours and len(ours) < len(sources):
        report.warn(
            _(
                "{folder}: the adapter was made by another tool, so its chat template cannot be compared. The combined "
                "adapter has that of {first}.",
                folder=next(source.path for source in sources if source.folder.metadata is None),
                first=ours[0].path,
            )
        )


def _other_base(first: Source, other: Source, report: Report) -> str:
    """Why the two belong to different base models; empty if they belong to one, or if that cannot be told."""
    one, two = first.folder.metadata, other.folder.metadata
    if one and two:
        mine, theirs = one["base"]["identity"], two["base"]["identity"]
        parts = [part for part in mine if mine[part] != theirs[part]]
        if not parts:
            return ""
        return _(
            "{first} and {other} belong to different base models ({base} and {theirs}); they differ in: {parts}. Only "
            "adapters of the same base model can be combined.",
            first=first.path,
            other=other.path,
            base=one["base"]["model"],
            theirs=two["base"]["model"],
            parts=listed(map(foreign, parts)),
        )
    names = [source.folder.peft_config.get("base_model_name_or_path") for source in (first, other)]
    if names[0] != names[1]:
        report.warn(
            _(
                "{first} names the base model {base}, and {other} names {theirs}. Whether these are the same cannot be "
                "told from the folders.",
                first=first.path,
                base=names[0] or _("not specified"),
                other=other.path,
                theirs=names[1] or _("not specified"),
            )
        )
    return ""


def _other_storage(sources: Sequence[Source]) -> list[str]:
    """A message if some adapters have their experts as PEFT 0.17 and 0.18 stored them, and others do not."""
    having = [source for source in sources if parameters_of(source.factors)]
    stored = {source.folder.stored_transposed: source for source in having}
    if None in stored:
        return [
            _(
                "{folder}: PEFT 0.17 and 0.18 stored the matrices of experts transposed, and adapter_config.json has "
                "no usable peft_version, so nothing tells whether they are so here. Add the version of PEFT that "
                'trained the adapter to it, such as "peft_version": "0.18.1".',
                folder=stored[None].path,
            )
        ]
    if len(stored) < 2:
        return []
    return [
        _(
            "{first} was written by PEFT 0.17 or 0.18, which stored the matrices of experts transposed, and {other} by "
            "a later program, so they cannot be combined. Merge one of them into its base model with lorasmith merge, "
            "and train the other one again on the result.",
            first=stored[True].path,
            other=stored[False].path,
        )
    ]


def _other_tokens(sources: Sequence[Source]) -> list[str]:
    """A message if two adapters added different tokens under one id, or one token under different ids."""
    by_id, by_token = dict[int, tuple[str, Source]](), dict[str, tuple[int, Source]]()
    for source in sources:
        for token, i in source.tokens.items():
            taken, other = by_id.setdefault(i, (token, source))
            if taken != token:
                return [
                    _(
                        "{first} and {other} added different tokens to the vocabulary with the id {id}: {token} and "
                        "{theirs}. Train both with the same data.add_tokens.",
                        first=other.path,
                        other=source.path,
                        id=i,
                        token=repr(taken),
                        theirs=repr(token),
                    )
                ]
            then, other = by_token.setdefault(token, (i, source))
            if then != i:
                return [
                    _(
                        "{first} and {other} added {token} to the vocabulary with different ids: {id} and {theirs}. "
                        "Train both with the same data.add_tokens.",
                        first=other.path,
                        other=source.path,
                        token=repr(token),
                        id=then,
                        theirs=i,
                    )
                ]
    return []


def kept_tensors(sources: Sequence[Source]) -> dict[str, Tensor]:
    """The tensors besides A and B that the combined adapter has, by PEFT's keys.

    A module or row that was trained in full is a value, not a change, and without the base model's value it cannot be
    weighted: it must be the same in all adapters that have it, and their weights must add up to 1.

    Raises AdapterError otherwise; also if one adapter trains a module in full to which another adds A and B.
    """
    kept, problems = dict[str, Tensor](), list[str]()
    adapted = {path for source in sources for path in source.factors}
    for key in dict.fromkeys(key for source in sources for key in source.kept):
        having = [source for source in sources if key in source.kept]
        kept[key] = having[0].kept[key]
        trained = any(source.is_trained(key) for source in having)
        same = all(
            is_same(kept[key], source.kept[key]) and _ids(key, source) == _ids(key, having[0]) for source in having
        )
        if trained and not (same and abs(sum(source.weight for source in having) - 1) < 1e-6):
            problems.append(_not_weighted(key, having))
        elif not same:
            problems.append(_other_frozen(key, having))
        if trained and (path := next((path for path in adapted if key.startswith(f"{PEFT_PREFIX}{path}.")), "")):
            problems.append(
                _(
                    "{path} is trained in full by {adapters}, but has LoRA in another adapter, so they cannot be "
                    "combined.",
                    path=path,
                    adapters=listed(str(source.path) for source in having),
                )
            )
    if problems:
        raise AdapterError(*dict.fromkeys(problems))
    return kept


def _ids(key: str, source: Source) -> str:
    """The ids of the tokens whose rows the tensor `key` has, in a form that can be compared."""
    return json.dumps(source.folder.peft_config.get("trainable_token_indices")) if key.endswith(ROWS) else ""


def _not_weighted(key: str, having: Sequence[Source]) -> str:
    return _(
        "{key}: {adapters} trained this in full (modules_to_save, or rows of tokens), so it is a value instead of a "
        "change of the base model's, and cannot be weighted. Only one of the adapters may have it, with the weight 1. "
        "Or merge one adapter into its base model with lorasmith merge, and train the others on the result.",
        key=key,
        adapters=listed(f"{source.path} ({source.weight:g})" for source in having),
    )


def _other_frozen(key: str, having: Sequence[Source]) -> str:
    return _(
        "{key} is a weight of the base model that was saved along, and it differs between {adapters}. Only adapters of "
        "the same base model can be combined.",
        key=key,
        adapters=listed(str(source.path) for source in having),
    )
