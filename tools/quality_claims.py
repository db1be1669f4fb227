"""The claims about LoRA that docs/quality.md puts to the test: for each, what the studies of the tasks found.

The claims are those of "LoRA Without Regret" (Schulman et al., Thinking Machines Lab, September 2025).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lorasmith.config.study import RATE
from lorasmith.evaluation.seeds import t_interval
from lorasmith.i18n import using_language
from lorasmith.runs.study.result import Curve, StudyResult
from tools.pages import notes, table

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
ALPHA = 32
VARIANTS = {
    "rslora": ("lora.use_rslora", True),
    "dora": ("lora.use_dora", True),
    "loraplus": ("training.loraplus_lr_ratio", 16),
    "pissa": ("lora.init_lora_weights", "pissa"),
}
UNKNOWN = "-"
Found = dict[str, Curve]


def claims(results: Mapping[str, Mapping[str, Any]], language: str) -> Iterator[str]:
    """The section of the page, from the results of the tasks that have any; claims without a figure are left out."""
    known = notes("quality")
    tasks = {name: values for name, values in results.items() if not name.startswith("quick-")}
    words = known["claims"][language]
    if not tasks:
        return
    yield from (f"## {words['title']}", "", words["about"].strip(), "")
    with using_language(language):
        found = {name: curves_of(StudyResult.from_json(values)) for name, values in tasks.items()}
        titles = [known["studies"][name][language]["title"] for name in tasks]
        rows = [[words[key], *(measure(curves, words) for curves in found.values())] for key, measure in CLAIMS.items()]
    yield from table([words["column"], *titles], (row for row in rows if any(cell != UNKNOWN for cell in row[1:])))
    yield from (words["follows"].strip(), "")


def curves_of(result: StudyResult) -> Found:
    """The curves that the claims speak of, by what they are called here."""
    found: Found = {}
    for curve in result.curves:
        targets, rank = curve.options.get("lora.target_modules"), curve.options.get("lora.r")
        variant = next((name for name, (key, value) in VARIANTS.items() if curve.options.get(key) == value), None)
        if curve.options.get("training.method") == "full":
            found["full"] = curve
        elif variant:
            found[variant] = curve
        elif targets == "all-linear" and curve.options.get("lora.lora_alpha") == ALPHA:
            found[f"r{rank}"] = curve
        elif targets in (ATTENTION, MLP):
            found["attention" if targets == ATTENTION else "mlp"] = curve
    return {name: curve for name, curve in found.items() if curve.best.losses}


def difference(one: str, other: str) -> Callable[[Found, Mapping[str, str]], str]:
    """How much higher the loss of `one` is than that of `other`, each at its best rate; with an interval over seeds."""

    def measure(found: Found, words: Mapping[str, str]) -> str:
        if one not in found or other not in found:
            return UNKNOWN
        losses = [{cell.seed: cell.loss.after for cell in found[name].best.cells if cell.loss} for name in (one, other)]
        seeds = sorted(losses[0].keys() & losses[1].keys())
        if not seeds:
            return UNKNOWN
        reference = sum(losses[1][seed] for seed in seeds) / len(seeds)
        shares = [(losses[0][seed] - losses[1][seed]) / reference for seed in seeds]
        text, interval = f"{sum(shares) / len(shares):+.1%}", t_interval(shares)
        return f"{text} [{interval[0]:+.1%}, {interval[1]:+.1%}]" if interval else f"{text} {words['one_seed']}"

    return measure


def rate_ratio(found: Found, _words: Mapping[str, str]) -> str:
    """The best learning rate of LoRA over that of full fine-tuning."""
    if "r8" not in found or "full" not in found:
        return UNKNOWN
    lora, full = (found[name].best.options[RATE] for name in ("r8", "full"))
    return f"{lora / full:.0f} ({lora:g} / {full:g})"


def rates_by_rank(found: Found, _words: Mapping[str, str]) -> str:
    """The best learning rate at each rank."""
    ranks = [name for name in ("r1", "r8", "r64") if name in found]
    return ", ".join(f"{name[1:]}: {found[name].best.options[RATE]:g}" for name in ranks) or UNKNOWN


def forgetting(names: Sequence[str]) -> Callable[[Found, Mapping[str, str]], str]:
    """How much the loss on the general text rose, for each of these at its best rate."""

    def measure(found: Found, _words: Mapping[str, str]) -> str:
        rises = [found[name].best.forgetting if name in found else None for name in names]
        return " / ".join(UNKNOWN if rise is None else f"{rise:+.3f}" for rise in rises)

    return measure


CLAIMS: dict[str, Callable[[Found, Mapping[str, str]], str]] = {
    "equal": difference("r8", "full"),
    "rate": rate_ratio,
    "ranks": rates_by_rank,
    "rank1": difference("r1", "r8"),
    "rank64": difference("r64", "r8"),
    "attention": difference("attention", "r8"),
    "mlp": difference("mlp", "r8"),
    **{name: difference(name, "r8") for name in VARIANTS},
    "forget": forgetting(("r8", "full")),
}
