"""Everything that lorasmith does with a family, on a tiny model of it, compared with transformers and PEFT.

`trial` makes the model's folder, loads it as a user would, and goes through the stages of STAGES. In float32 the
results must equal those of PEFT. In bfloat16 both are compared with the float32 results on the same weights (which are
rounded to bfloat16 when they are made): ours may be as far away as PEFT's, and not further.
"""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorasmith.adapters.merge import merge_run
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.engine import Engine, replies
from lorasmith.engine.request import Request
from lorasmith.errors import LorasmithError, first_line
from lorasmith.loading.load import load_base
from lorasmith.lora.files import save_adapter
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base
from lorasmith.model.forward import row_of
from lorasmith.model.head import loss_sum
from lorasmith.model.probe import native_attention
from lorasmith.model.row import Example
from lorasmith.model.target_check import check_targets
from lorasmith.model.verify import enable_fast_parts, use_fast_parts
from lorasmith.report import Report
from lorasmith.system.transformers_logging import quiet_transformers
from tests.model.parity.configs import tiny_config
from tests.support.tiny import tokenizer

DTYPES = ("float32", "bfloat16")
IDS = [5, 17, 60, 3, 8, 44, 92, 31, 9, 9, 12, 71, 4, 20, 6, 50]
LENGTHS = (7, 12, 4, 9)  # of the examples; below SHARED common tokens
PROMPTS = (5, 11, 3)
NEW_TOKENS = 6
SEEDS = (1, 2, 3)  # of the adapters
RANDOM = "The model itself draws random numbers in training mode, so its training is compared in evaluation mode."
REPEATED = "With the adapter of seed"


@dataclass
class Outcome:
    """What happened to a family in one dtype.

    verdict: the layout, "refused" or "fails"; why: the reason for it, if the layout is not packed; said: what was
    reported; peft: what PEFT makes of the saved adapter; differences: the largest of each comparison, relative;
    problems: of each stage that did not work, with ! in front if it is not refused by name.
    """

    verdict: str = ""
    why: str = ""
    said: list[str] = field(default_factory=list)
    peft: str = ""
    differences: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


class Heard(Report):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str, **_more: Any) -> None:
        self.said.append(text)

    def warn(self, text: str, **_more: Any) -> None:
        self.said.append(text)


@dataclass
class Results:
    """Of one way to compute the examples: loss, and gradients and logits as one vector each."""

    loss: Tensor
    gradient: dict[str, Tensor]
    logits: list[Tensor]


def trial(family: str, folder: Path, dtypes: tuple[str, ...] = DTYPES) -> dict[str, Outcome]:
    """The outcome in each dtype; `folder` is an empty folder for the model and adapters.

    With some weights of the adapter, rounding changes the expert that a router chooses, and so the results by far more
    than rounding, in transformers and PEFT too. So a family fails only if it fails with each of several adapters, and
    what was found with those before is said.
    """
    make_model(family, folder / "model")
    before: dict[str, list[str]] = {dtype: [] for dtype in dtypes}
    for seed in SEEDS:
        outcomes, reference = dict[str, Outcome](), None
        for dtype in dtypes:
            one = _Trial(folder / str(seed), folder / "model", dtype, reference, seed)
            one.run()
            reference = reference or one.alone
            outcomes[dtype] = one.outcome
        failed = {dtype: outcome for dtype, outcome in outcomes.items() if outcome.verdict == "fails"}
        if not failed:
            break
        for dtype, outcome in failed.items():
            before[dtype] += [
                f"{REPEATED} {seed}: {stage}: {text.removeprefix('!')}" for stage, text in outcome.problems.items()
            ]
    for dtype, outcome in outcomes.items():
        outcome.said += before[dtype] if outcome.verdict != "fails" else []
    return outcomes


def make_model(family: str, folder: Path) -> None:
    """Write a model folder whose float32 weights are exact in bfloat16, with the tiny tokenizer."""
    with torch.no_grad(), torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(tiny_config(family))
        for p in model.parameters():
            p.copy_((torch.randn_like(p) * 0.1 if p.dim() > 1 else p).bfloat16())
        model.save_pretrained(folder)
    tokenizer("llama").save_pretrained(folder)


class _Trial:
    def __init__(self, folder: Path, model: Path, dtype: str, reference: Results | None, seed: int) -> None:
        self.folder, self.model, self.dtype, self.reference, self.seed = folder, model, dtype, reference, seed
        self.adapter_folder = folder / f"adapter-{dtype}"
        self.outcome, self.report = Outcome(), Heard()
        self.base: Base | None = None
        self.alone: Results | None = None

    def run(self) -> None:
        """All stages. Those that need a model are left out if there is none."""
        if not (self._stage("load", self._load) and self._stage("inject", self._inject)):
            refused = self.outcome.problems.get("load") or self.outcome.problems["inject"]
            self.outcome.verdict = "fails" if refused.startswith("!") else "refused"
            self.outcome.why = refused
            return
        base = self.base
        assert base is not None
        self.outcome.verdict = "one by one" if base.one_by_one else base.layout
        self.outcome.why = "" if base.layout == "packed" else base.why["layout"]
        self.outcome.said = self.report.said
        for name in ("fresh", "alone", "batch", "step", "save", "peft", "merge", "generate"):
            self._stage(name, getattr(self, f"_{name}"))
        if any(problem.startswith("!") for problem in self.outcome.problems.values()):
            self.outcome.verdict = "fails"

    def _stage(self, name: str, act: Any) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                act()
        except LorasmithError as error:
            self.outcome.problems[name] = " / ".join(error.problems)
        except Exception as error:  # noqa: BLE001 (any exception is a finding)
            at = traceback.extract_tb(error.__traceback__)
            ours = next((f for f in reversed(at) if "lorasmith" in f.filename), at[-1])
            self.outcome.problems[name] = (
                f"!{type(error).__name__}: {first_line(error)} ({Path(ours.filename).name}:{ours.lineno}, "
                f"{Path(at[-1].filename).name}:{at[-1].lineno})"
            )
        return name not in self.outcome.problems

    # --- the stages ---------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        self.base = load_base(ModelConfig(model=str(self.model), dtype=self.dtype, device="cpu"), self.report)

    def _inject(self) -> None:
        assert self.base
        base = self.base
        base.adapters["a"] = inject(base.model, LoraConfig(r=2, lora_alpha=4), base.router, "a")
        check_targets(base, "a", IDS, self.report)
        use_fast_parts(base, frozenset())  # which round otherwise
        self.fresh = [self._logits(base.model, ids) for ids in texts()]
        enable_fast_parts(base, "a", IDS)

    def _fresh(self) -> None:
        """The new adapter changes nothing."""
        self._limit("fresh", max(distance(a, b) for a, b in zip(self.fresh, self._plain_logits(), strict=True)), 0.0)

    def _alone(self) -> None:
        """Each example alone, as transformers computes it, with the adapter."""
        assert self.base
        stir(self.base, self.seed)
        self.alone = self._one_by_one(self.base.model, self.base.adapters["a"].parameters, native=True)

    def _batch(self) -> None:
        """All examples in one row, as in training: loss and gradients."""
        assert self.base
        assert self.alone
        parameters = self.base.adapters["a"].parameters
        batch = examples()
        if self._is_random():
            self.base.model.eval()
            self.report.say(RANDOM)
        loss = loss_sum(self.base, row_of(self.base, batch, float(sum(e.weight for e in batch)), "a"))
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        self.batch = Results(loss.detach(), dict(zip(parameters, found, strict=True)), [])
        self._compare("batch", self.batch, self.alone)

    def _step(self) -> None:
        """A small step along the gradient makes the loss smaller, by what the gradient predicts."""
        assert self.base
        parameters = self.base.adapters["a"].parameters
        before = {key: p.detach().clone() for key, p in parameters.items()}
        norm = torch.stack([g.norm() for g in self.batch.gradient.values()]).norm()
        length = 1e-2
        batch = examples()
        with torch.no_grad():
            for key, p in parameters.items():
                p -= length * self.batch.gradient[key] / norm
            loss = loss_sum(self.base, row_of(self.base, batch, float(sum(e.weight for e in batch)), "a"))
            for key, p in parameters.items():
                p.copy_(before[key])
        predicted = float(norm) * length
        if self.dtype == "float32":
            self._limit("step", abs(float(self.batch.loss - loss) - predicted) / predicted, 0.9)
        elif not torch.isfinite(loss):
            self.outcome.problems["step"] = "!the loss is not finite"

    def _save(self) -> None:
        assert self.base
        save_adapter(self.base.adapters["a"], self.base.model, self.adapter_folder, str(self.model))

    def _peft(self) -> None:
        """PEFT loads what was saved, and computes the same logits, loss and gradients."""
        assert self.base
        assert self.alone
        plain, ours = self._plain(), self.base.adapters["a"].parameters
        try:
            with quiet_transformers():
                theirs = peft.PeftModel.from_pretrained(plain, self.adapter_folder, is_trainable=True).eval()
        except Exception as error:  # noqa: BLE001 (any exception is a finding)
            self.outcome.peft = f"cannot load it: {first_line(error)}"
            return
        named = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
        lost = [key for key, p in ours.items() if key not in named or distance(named[key], p) > 0]
        if lost or len(named) > len(ours):
            self.outcome.peft = f"loses {len(lost)} of {len(ours)} tensors, such as {(lost or sorted(named))[0]}"
            return
        self.outcome.peft = "equal"
        for key, p in named.items():
            p.data = p.data.to(ours[key].dtype)
        found = self._one_by_one(theirs, {key: named[key] for key in ours}, native=False)
        self._compare("peft", self.alone, found)

    def _merge(self) -> None:
        settings = ModelConfig(model=str(self.model), dtype=self.dtype, device="cpu")
        certificate = merge_run(self.adapter_folder, self.folder / f"merged-{self.dtype}", settings)
        self.outcome.differences["merge"] = certificate.error

    def _generate(self) -> None:
        """Greedy tokens of several prompts at once: none that transformers, alone, finds less likely than another."""
        assert self.base
        prompts = [[3 + (7 * n + 5 * i) % 290 for i in range(n)] for n in PROMPTS]
        settings = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0)
        answers = replies(Engine(self.base, slots=len(prompts)), [Request(ids, settings, "a") for ids in prompts])
        worst = 0.0
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = self._logits(self.base.model, [*prompt, *answer.ids])[len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
            worst = max(worst, float(((logits.max(-1).values - chosen) / logits.std(-1)).max()))
        self._limit("generate", worst, 1e-3 if self.dtype == "float32" else 0.5)

    # --- parts of them ------------------------------------------------------------------------------------------------

    def _is_random(self) -> bool:
        """Whether two equal passes in training mode differ, as in PhiMoE, whose router draws experts."""
        assert self.base
        base, batch = self.base, examples()
        with torch.no_grad():
            first, second = (loss_sum(base, row_of(base, batch, float(len(batch)), "a"))[None] for _pass in range(2))
        return distance(first, second) > 1e-6

    def _plain(self) -> Any:
        with quiet_transformers():
            return AutoModelForCausalLM.from_pretrained(self.model, dtype=getattr(torch, self.dtype)).eval()

    def _plain_logits(self) -> list[Tensor]:
        plain = self._plain()
        with torch.no_grad():
            return [plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in texts()]

    def _logits(self, model: Any, ids: list[int]) -> Tensor:
        assert self.base
        with torch.no_grad(), native_attention(self.base), evaluating(model):
            logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits

    def _one_by_one(self, model: Any, parameters: dict[str, Any], native: bool) -> Results:
        assert self.base
        batch = examples()
        total, losses, logits = sum(e.weight for e in batch), [], []
        with native_attention(self.base), evaluating(model):
            for e in batch:
                out = model(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0]
                each = torch.nn.functional.cross_entropy(out.float(), torch.tensor(e.targets), reduction="none")
                losses.append((each * torch.tensor(e.weights)).sum() / total)
                logits.append(out.detach())
            loss = torch.stack(losses).sum()
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return Results(loss.detach(), dict(zip(parameters, found, strict=True)), logits)

    def _compare(self, name: str, ours: Results, theirs: Results) -> None:
        """In float32 the two directly; in bfloat16 each with the float32 results."""
        if self.dtype == "float32" or self.reference is None:
            self._limit(f"{name} loss", distance(ours.loss[None], theirs.loss[None]), 1e-4)
            self._limit(f"{name} gradient", far(ours.gradient, theirs.gradient), 1e-3)
            if ours.logits:
                self._limit(f"{name} logits", max(map(distance, ours.logits, theirs.logits)), 1e-4)
            return
        reference = self.reference
        off = [distance(one.loss[None], reference.loss[None]) for one in (ours, theirs)]
        self._limit(f"{name} loss", off[0], max(0.01, 3 * off[1]))
        turned = [far(one.gradient, reference.gradient) for one in (ours, theirs)]
        self.outcome.differences[f"{name} gradient of the other"] = turned[1]
        self._limit(f"{name} gradient", turned[0], max(0.15, 3 * turned[1]))

    def _limit(self, name: str, value: float, limit: float) -> None:
        self.outcome.differences[name] = value
        if not value <= limit:
            stage = name.split(" ")[0]
            text = f"!{name} differs by {value:.1e}"
            self.outcome.problems[stage] = (
                f"{self.outcome.problems[stage]}; {text}" if stage in self.outcome.problems else text
            )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """In eval mode inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def texts() -> list[list[int]]:
    """Token ids of the examples."""
    return [[3 + (11 * n + 13 * i * i + i) % 290 for i in range(n)] for n in LENGTHS]


def examples() -> list[Example]:
    """The texts, with every token learned."""
    return [Example(ids, [*ids[1:], 3], [1.0] * len(ids), "trial") for ids in texts()]


@torch.no_grad()
def stir(base: Base, seed: int) -> None:
    """Give the adapter random weights, the same in each dtype."""
    generator = torch.Generator().manual_seed(seed)
    for p in base.adapters["a"].parameters.values():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def distance(a: Tensor, b: Tensor) -> float:
    """The norm of the difference, relative to that of `b`."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def far(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The same of all gradients as one vector."""
    one, other = (torch.cat([side[key].flatten() for key in sorted(theirs)]) for side in (ours, theirs))
    return distance(one, other)
