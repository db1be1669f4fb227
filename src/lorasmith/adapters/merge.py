"""Merging an adapter into its base model as a plain transformers folder, checked against the adapter's logits."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lorasmith.adapters.certificate import Export, certify_folder, identity_of
from lorasmith.adapters.folder import end_ids, find_adapter
from lorasmith.adapters.output import OutputFolder, output_folder
from lorasmith.adapters.session import Session, open_adapters
from lorasmith.adapters.whole_model import set_encoding
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.golden import PROBES
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.loading.folder import read_config
from lorasmith.loading.tokenizer_file import save_tokenizer
from lorasmith.lora.merge import merged_weights, plain_name
from lorasmith.lora.quantized import is_quantized, plain_weight, unquantized
from lorasmith.model.probe import native_attention
from lorasmith.model.rounding import rounding_errors
from lorasmith.model.vocabulary import embedding_rows
from lorasmith.report import Report, Steps
from lorasmith.system.device import dtype_name
from lorasmith.system.transformers_logging import quiet_transformers

FLOAT32_LIMIT = 1e-4  # relative error; computing (W + B A) x instead of W x + B (A x) gives about 1e-6
MARGIN = 1.2  # rounding W + B A changes the logits about as much as rounding W: up to 1.1 times as much was observed
EXPERTS_SHARE = 0.95  # of the positions, in a mixture of experts; 1 to 2% were sent to another expert in tiny models
STEPS = 5  # merged, two runs, saved, read back
NOISY_RUNS = 2  # in half precision, with further rounding errors: they may send tokens to other experts, as merging may


@dataclass(frozen=True)
class Certificate:
    """How closely the merged model's logits match the adapter's on the probe conversations.

    `error` is the root mean square difference relative to that of the logits, and `limit` is its allowed maximum.
    `positions` counts the positions whose most likely token rounding cannot change, and `agreeing` those of them
    where both models predict the same token. `share` of the positions must be as close as that: all, except in half
    precision in a mixture of experts, where rounding sends a few tokens to other experts.
    """

    folder: str
    dtype: str
    error: float
    limit: float
    agreeing: int
    positions: int
    untied: bool
    share: float = 1.0

    @property
    def holds(self) -> bool:
        """Whether the merged model can replace the adapter."""
        return self.error <= self.limit and self.agreeing >= self.share * self.positions

    def reading(self) -> dict[str, Any]:
        """Who read it back, and its figures, for the certificate of a folder."""
        figures = {name: value for name, value in asdict(self).items() if name not in ("folder", "untied")}
        return {"reader": "transformers", "version": version("transformers"), **figures}

    def __str__(self) -> str:
        return _(
            "{dtype}: relative logit error {error:.1e} (limit {limit:.1e}); the top token agrees at {agreeing} "
            "of {positions} positions",
            dtype=self.dtype,
            error=self.error,
            limit=self.limit,
            agreeing=self.agreeing,
            positions=self.positions,
        )


def merge_run(
    path: str | Path,
    output: str | Path,
    config: ModelConfig | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> Certificate:
    """Merge the adapter of a run or adapter folder into its base model, and write a plain model folder to `output`.

    The weights are saved in `config.dtype`, or, if that is auto, in the dtype of the base model on disk. They are
    added in float64, starting from the base model in float32, and rounded once. The folder appears under its name
    only after it has been loaded again and compared.

    Raises:
        RunError: `output` already exists, contains the base model or the adapter, or cannot be written.
        AdapterError: there is no adapter, it belongs to another base model, or the merged model's logits differ by
            more than rounding explains.
    """
    with output_folder(output, overwrite) as folder:
        return _merge(path, folder, config or ModelConfig(), report or Report())


def _merge(path: str | Path, output: OutputFolder, config: ModelConfig, report: Report) -> Certificate:
    wide = config.model_dump(exclude_unset=True) | {"dtype": "float32"}
    session = open_adapters([find_adapter(Path(path).expanduser())], ModelConfig(**wide), report)
    output.spare([session.base.folder, *(folder.path for folder in session.folders.values())])
    dtype = _dtype_on_disk(session, config) if config.dtype == "auto" else getattr(torch, config.dtype)
    report.say(_("Merging in {dtype}", dtype=dtype_name(dtype)))
    plain, untied = _merged_model(session, dtype, config.trust_remote_code)
    steps = Steps(report, _("merging"), STEPS + (NOISY_RUNS if _is_half(dtype) else 0))
    steps.step()
    expected = _Expected.of(session, plain, dtype, steps)
    certificates: list[Certificate] = []

    def fill(staging: Path) -> None:
        _save(plain, session, staging)
        steps.step()
        certificate = expected.compare(staging, output.path, untied, config.trust_remote_code)
        _refuse_wrong(certificate)
        certify_folder(staging, "transformers", identity_of(session), [certificate.reading()])
        certificates.append(certificate)
        steps.step()

    output.write(fill)
    report.say(str(certificates[0]))
    if untied:
        report.say(
            _(
                "The input embedding and the output head are no longer tied: config.json now has "
                "tie_word_embeddings=false"
            )
        )
    return certificates[0]


def compare_merged(path: str | Path, folder: Path, config: ModelConfig, report: Report) -> Export:
    """Compare a merged folder with the adapter of a run or adapter folder, and write its certificate anew.

    Raises AdapterError if the folder is not the model that merging gives.
    """
    wide = config.model_dump(exclude_unset=True) | {"dtype": "float32"}
    session = open_adapters([find_adapter(Path(path).expanduser())], ModelConfig(**wide), report)
    dtype = getattr(read_config(folder, config.trust_remote_code), "dtype", None) or torch.float32
    plain, untied = _merged_model(session, dtype, config.trust_remote_code)
    report.say(_("Comparing {file} with the trained model", file=folder))
    steps = Steps(Report(), "", 0)
    found = _Expected.of(session, plain, dtype, steps).compare(folder, folder, untied, config.trust_remote_code)
    if not found.holds:
        raise AdapterError(_("{file} is not the trained model: {problem}.", file=folder, problem=found))
    return certify_folder(folder, "transformers", identity_of(session), [found.reading()])


@dataclass(frozen=True)
class _Expected:
    """What a merged model in `dtype` is expected to say on the probes. rounded, share: see `certify`."""

    dtype: torch.dtype
    probes: Sequence[list[int]]
    wanted: Sequence[Tensor]
    rounded: Sequence[Sequence[Tensor]]
    share: float

    @classmethod
    def of(cls, session: Session, plain: PreTrainedModel, dtype: torch.dtype, steps: Steps) -> "_Expected":
        """Ask the adapter, then round its base model. plain: the merged model."""
        probes = probe_rows(session)
        wanted = adapter_logits(session, probes)
        _round_base(session, plain)
        steps.step()
        rounded = [adapter_logits(session, probes)]
        steps.step()
        is_half = _is_half(dtype)
        for seed in range(NOISY_RUNS if is_half else 0):
            with rounding_errors(session.base.model, seed):
                rounded.append(adapter_logits(session, probes))
            steps.step()
        return cls(dtype, probes, wanted, rounded, EXPERTS_SHARE if is_half and _has_experts(plain) else 1.0)

    def compare(self, folder: Path, name: Path, untied: bool, trust_remote_code: bool) -> Certificate:
        """Read a folder back, with transformers. name: what it is or will be called."""
        found = plain_logits(load_plain(folder, None, self.dtype, trust_remote_code), self.probes)
        return certify(str(name), self.dtype, self.wanted, self.rounded, found, untied, self.share)


def certify(
    folder: str,
    dtype: torch.dtype,
    wanted: Sequence[Tensor],
    rounded: Sequence[Sequence[Tensor]],
    merged: Sequence[Tensor],
    untied: bool,
    share: float = 1.0,
    floor: float = FLOAT32_LIMIT,
) -> Certificate:
    """Compare the logits of each probe, float tensors of shape [L, V] for L tokens and V entries of the vocabulary.

    wanted: of the adapter on the base model in float32.
    rounded: of the adapter on the base model rounded to `dtype`, in one or several runs that round differently.
    merged: of the merged model.

    The limit is `floor`, or, if it is larger, 1.2 times the error that rounding the base model alone causes. The most
    likely token must agree wherever its lead over the second is larger than that rounding can undo.
    """
    a, m, *runs = (torch.cat([t.double() for t in side]) for side in (wanted, merged, *rounded))
    size = a.pow(2).mean().sqrt()

    def off(other: Tensor) -> float:
        """The relative error of `other` in the closest `share` of the positions."""
        squares_L = (other - a).pow(2).mean(-1).sort().values
        return float(squares_L[: max(1, round(share * len(squares_L)))].mean().sqrt() / size)

    limit = max(floor, *(MARGIN * off(r) for r in runs))
    top = a.topk(2, dim=-1)
    lead = top.values[:, 0] - top.values[:, 1]
    most = max(float((r - a).abs().max()) for r in runs)
    clear = lead > max(2 * MARGIN * most, floor * float(size))
    same = m.argmax(-1) == top.indices[:, 0]
    return Certificate(
        folder, dtype_name(dtype), off(m), limit, int((same & clear).sum()), int(clear.sum()), untied, share
    )


def _refuse_wrong(certificate: Certificate) -> None:
    if certificate.holds:
        return
    text = _(
        "{output}: not written, because the merged model does not match the adapter: {certificate}.",
        output=certificate.folder,
        certificate=certificate,
    )
    if certificate.dtype not in ("float32", "float64"):
        text += " " + _("Merge in float32 with --dtype float32.")
    raise AdapterError(text)


def probe_rows(session: Session) -> list[list[int]]:
    """Token ids of the probe conversations, cut to the context length; plain text if the template rejects one."""
    template, limit = session.template, session.base.max_positions
    found = []
    for probe in PROBES:
        ids = template.probe_ids(probe)
        if not ids:
            text = " ".join(message.content for message in probe)
            ids = session.base.tokenizer(text, add_special_tokens=False)["input_ids"]
        found.append([i for i in ids if i < embedding_rows(session.base)][:limit])
    added = [i for folder in list(session.folders.values())[:1] for i in folder.added_tokens.values()]
    return [*found, added[:limit]] if added else found


def _save(plain: PreTrainedModel, session: Session, folder: Path) -> None:
    _set_encoding(plain, session)
    with quiet_transformers():  # it would show a progress bar
        plain.save_pretrained(folder)
        save_tokenizer(session.template.tokenizer, folder)


def _set_encoding(plain: PreTrainedModel, session: Session) -> None:
    """Save the template, system message and stop tokens of the training, if they differ from the base model's."""
    template, tokenizer = session.template, session.template.tokenizer
    if session.folders[session.names[0]].metadata is None:
        return  # made by another tool; its tokenizer has its template
    set_encoding(template, tokenizer, plain.generation_config, end_ids(session.base))


@torch.no_grad()
def _merged_model(session: Session, dtype: torch.dtype, trust_remote_code: bool) -> tuple[PreTrainedModel, bool]:
    """A plain model with the merged weights in `dtype`, and whether its embedding and head had to be untied."""
    model = session.base.model
    merged = merged_weights(model, session.base.adapters[session.names[0]], dtype)
    kept = {plain_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    quantized = {plain_name(f"{path}.weight"): part for path, part in model.named_modules() if is_quantized(part)}
    untied = _must_untie(model, merged)
    config = _config(session, trust_remote_code)
    if untied:
        config.tie_word_embeddings = False
    plain = load_plain(session.base.folder, config, dtype, trust_remote_code)
    if session.base.model.config.get_text_config().vocab_size > plain.config.get_text_config().vocab_size:
        plain.resize_token_embeddings(embedding_rows(session.base), mean_resizing=False)  # the adapter adds tokens
    _refuse_shared(plain, merged)
    for name, parameter in plain.named_parameters():
        if name in merged:
            parameter.copy_(merged[name])
        else:
            parameter.copy_(kept[name] if name in kept else plain_weight(quantized[name], torch.float32))
    return plain, untied


def _refuse_shared(plain: PreTrainedModel, merged: dict[str, Tensor]) -> None:
    """Raise AdapterError if merging gives a weight that several layers share different values."""
    first: dict[int, str] = {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        a, b = (merged.get(one) for one in (other, name))
        if a is not b and (a is None or b is None or not torch.equal(a, b)):
            raise AdapterError(
                _(
                    "{first} and {second} are one weight in {kind}, but the adapter trains them separately, so it "
                    "cannot be merged. Use the adapter as it is.",
                    first=other,
                    second=name,
                    kind=type(plain).__name__,
                )
            )


def _is_half(dtype: torch.dtype) -> bool:
    return dtype not in (torch.float32, torch.float64)


def _has_experts(model: PreTrainedModel) -> bool:
    return any("experts" in path.split(".") for path, _module in model.named_modules())


def _must_untie(model: PreTrainedModel, merged: dict[str, Tensor]) -> bool:
    """Whether merging gives the tied embedding and head different weights."""
    if (
        not getattr(model.config.get_text_config(), "tie_word_embeddings", False)
        or model.get_output_embeddings() is None
    ):
        return False
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    paths = [next(name for name, m in model.named_modules() if m is end) for end in ends]
    new = [merged.get(f"{path}.weight") for path in paths]
    if new[0] is None and new[1] is None:
        return False
    return new[0] is None or new[1] is None or not torch.equal(new[0], new[1])


def load_plain(
    folder: Path, config: PretrainedConfig | None, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """A model folder as transformers loads it."""
    with quiet_transformers():  # it would report an untied head as missing, which is filled in afterwards
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    model.eval()
    return model


@torch.no_grad()
def _round_base(session: Session, plain: PreTrainedModel) -> None:
    """Give the base model's weights and buffers the dtypes of `plain`, which keeps some tensors in float32.

    The adapter's keep theirs: this is the alternative to merging.
    """
    model, dtypes = (
        session.base.model,
        {name: t.dtype for name, t in (*plain.named_parameters(), *plain.named_buffers())},
    )
    own = {id(p) for p in session.base.adapters[session.names[0]].parameters.values()}
    for path, module in list(model.named_modules()):
        if is_quantized(module):
            model.set_submodule(path, unquantized(module))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in own and (own_name := plain_name(name)) in dtypes:
            tensor.data = tensor.data.to(dtypes[own_name])


def adapter_logits(session: Session, probes: Sequence[list[int]]) -> list[Tensor]:
    """The adapter's logits, computed with transformers' own attention."""
    with native_attention(session.base):
        return plain_logits(session.base.model, probes)


@torch.no_grad()
def plain_logits(model: PreTrainedModel, probes: Sequence[list[int]]) -> list[Tensor]:
    """The logits of a model for each probe: float32 of shape [L, V], on the CPU."""
    rows = [torch.tensor([ids], device=model.device) for ids in probes]
    return [model(input_ids=row, use_cache=False).logits[0].float().cpu() for row in rows]


def _config(session: Session, trust_remote_code: bool) -> PretrainedConfig:
    """The base model's config from disk; the loaded one has its dropouts set to 0."""
    return read_config(session.base.folder, trust_remote_code)


def _dtype_on_disk(session: Session, config: ModelConfig) -> torch.dtype:
    dtype = getattr(_config(session, config.trust_remote_code), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
