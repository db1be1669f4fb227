"""The pictures of docs/concepts.md, from trainings of the demo's model: python docs/pictures/make_concepts.py [RUNS].

RUNS (runs/concepts) holds the four trainings; those that are finished are not trained again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from safetensors.torch import load_file

from lorasmith.adapters.session import open_adapters
from lorasmith.config.toml import load_config
from lorasmith.data.dataset.prepare import prepare
from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.demo.run import MODEL, demo_config, demo_files
from lorasmith.evaluation.loss import compare, evaluate_loss
from lorasmith.loading.gguf import packaged_model
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.model.row import IGNORED, Example, Row, flatten
from lorasmith.report import Report
from lorasmith.runs.train import train
from lorasmith.training.history import read_losses
from lorasmith.training.run_files import read_summary

HERE, STEPS = Path(__file__).parent, 20
RUNS: dict[str, dict[str, Any]] = {
    "r = 1": {"r": 1},
    "r = 8": {"r": 8},
    "r = 64": {"r": 64},
    "r = 64, use_rslora": {"r": 64, "use_rslora": True},
}
READ, LEARNED, STOP = "#d9dde3", "#9ad3a4", "#2e8b57"
SYSTEM = "You work in a lamp shop. Be short."
TALKS = (
    ("Are you open?", "Until eight."),
    ("Do you deliver?", "Yes, within two days."),
    ("Which socket?", "E14 or E27."),
)


def main() -> None:
    """Train what is missing, then draw."""
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/concepts")
    folders = {name: trained(runs, name) for name in RUNS}
    template = Template.of(load_tokenizer(packaged_model(MODEL, Report())))
    draw_mask(template)
    draw_row(template)
    draw_ranks(folders)
    draw_directions(folders)
    draw_rows(folders["r = 8"])


def trained(runs: Path, name: str) -> Path:
    """The demo's rows, twenty steps of eight; only the rank and the scaling differ, and lora_alpha is 16."""
    folder = runs / "".join(letter for letter in name if letter.isalnum())
    if read_summary(folder) is None:
        print("training", name)
        config = demo_config(STEPS, str(folder), *demo_files(Report()))
        lora = config.lora.model_copy(update=RUNS[name])
        training = config.training.model_copy(update={"eval_every": 5})
        train(config.model_copy(update={"lora": lora, "training": training}), overwrite=True)
    return folder


def figure(width: float, height: float) -> tuple[Any, Axes]:
    """One style for all: white, so that it reads on a dark page too."""
    made, axes = pyplot.subplots(figsize=(width, height), layout="constrained", facecolor="white")
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def save(made: Any, name: str) -> None:
    """As a small PNG beside this file."""
    made.savefig(HERE / name, dpi=110, metadata={"Software": None})
    pyplot.close(made)


def encoded(template: Template, asked: str, answer: str, system: str = SYSTEM) -> Example:
    """One question and its answer."""
    return template.encode([Message("system", system), Message("user", asked), Message("assistant", answer)])


def draw_mask(template: Template) -> None:
    """The tokens of a conversation, colored by whether they are learned."""
    talk = [Message("system", SYSTEM)]
    for asked, answer in TALKS[:2]:
        talk += [Message("user", asked), Message("assistant", answer)]
    example = template.encode(talk)
    kinds = [IGNORED, *example.targets[:-1]]  # what position i must predict is token i + 1
    made, axes = figure(7.9, 3.3)
    x, y = 0.0, 0.0
    for token, target in zip(example.ids, kinds, strict=True):
        text = template.tokenizer.decode([token])
        shown = text.replace("\n", "\u21b5").replace(" ", "\u00b7")
        color = READ if target == IGNORED else STOP if target in template.stop_ids else LEARNED
        width = len(shown) + 0.8
        axes.add_patch(Rectangle((x, y), width - 0.15, 0.82, facecolor=color, edgecolor="none"))
        ink = "white" if color == STOP else "#1a1a1a"
        axes.text(x + (width - 0.15) / 2, y + 0.4, shown, family="monospace", ha="center", va="center", color=ink)
        x += width
        if "\n" in text:
            x, y = 0.0, y - 1.0
    for place, (label, color) in enumerate((("only read", READ), ("learned", LEARNED), ("learned: stop", STOP))):
        axes.add_patch(Rectangle((17 * place, 1.35), 1.6, 0.7, facecolor=color, edgecolor="none"))
        axes.text(17 * place + 2.2, 1.7, label, va="center")
    axes.set(xlim=(-0.3, 56), ylim=(y - 0.2, 2.3))
    axes.axis("off")
    save(made, "mask.png")


def sees(row: Row) -> np.ndarray:
    """[T, T]: 1 where a token sees one of its own span, 2 where one of a span that its own continues, else 0."""
    seen = np.zeros((row.tokens, row.tokens))
    for span in row.spans:
        for token in range(span.start, span.end):
            seen[token, span.start : token + 1] = 1
        parent = span.parent
        while parent >= 0:
            seen[span.start : span.end, row.spans[parent].start : row.spans[parent].end] = 2
            parent = row.spans[parent].parent
    return seen


def draw_row(template: Template) -> None:
    """What each token of a row sees: three examples end to end, and with what they share computed once."""
    examples = [encoded(template, *talk) for talk in TALKS]
    made, both = pyplot.subplots(1, 2, figsize=(8.6, 4.7), layout="constrained", facecolor="white")
    colors = matplotlib.colors.ListedColormap(["#f4f5f7", LEARNED, "#4f86c6"])
    for axes, share in zip(both, (False, True), strict=True):
        row = flatten(examples, 1.0, share=share)
        axes.imshow(sees(row), cmap=colors, vmin=0, vmax=2, interpolation="nearest")
        kind = "what they share stands once" if share else "end to end"
        axes.set_title(f"{kind}: {row.tokens} tokens", fontsize=10, pad=8)
        axes.set(xlabel="token that is seen", ylabel="token that sees")
    save(made, "row.png")


def draw_ranks(folders: dict[str, Path]) -> None:
    """Held-out loss over the steps, a line for each rank."""
    made, axes = figure(8, 3.8)
    sizes = (13, 9, 4.5, 6)  # the first three lie on each other
    for (name, folder), size in zip(folders.items(), sizes, strict=True):
        numbers = read_summary(folder).trainable_parameters  # type: ignore[union-attr]
        steps, losses = zip(*read_losses(folder)[1], strict=True)
        label = f"{name}: {numbers / 1e6:.1f} M numbers"
        axes.plot(steps, losses, marker="o", markersize=size, linewidth=size / 3, label=label)
    axes.set(xlabel="step", ylabel="held-out loss (nats per learned token)", xticks=range(0, STEPS + 1, 5))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save(made, "ranks.png")


def singular_values(folder: Path) -> list[np.ndarray]:
    """Those of B A, the largest first, of every module."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    found = []
    for name, A_RI in tensors.items():
        if "lora_A" in name:
            B_OR = tensors[name.replace("lora_A", "lora_B")]
            inner = torch.linalg.qr(B_OR.double()).R @ torch.linalg.qr(A_RI.double().t()).R.t()
            found.append(torch.linalg.svdvals(inner).numpy())
    return found


def draw_directions(folders: dict[str, Path]) -> None:
    """How much of the update, in the square, its first directions hold; the middle module and nine of ten."""
    made, axes = figure(8, 3.8)
    for name in ("r = 8", "r = 64"):
        values = np.array(singular_values(folders[name]))
        held = 100 * np.cumsum(values**2, axis=1) / np.sum(values**2, axis=1, keepdims=True)
        low, middle, high = np.percentile(held, (5, 50, 95), axis=0)
        first = np.arange(1, held.shape[1] + 1)
        (line,) = axes.plot(first, middle, marker="o", markersize=4, label=f"{name}, median of {len(held)} modules")
        axes.fill_between(first, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        print(name, "first direction", round(float(middle[0]), 1), "%; first four", round(float(middle[3]), 1), "%")
    axes.set(xscale="log", xlabel="first directions of B A", ylabel="% of its square that they hold", ylim=(0, 103))
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    save(made, "directions.png")


def draw_rows(folder: Path) -> None:
    """Each held-out conversation: its loss under the base, and under the adapter."""
    session = open_adapters([folder])
    config = load_config(folder / "config.toml", {})
    examples: Sequence[Example] = prepare(config.data, session.template, None).held_out
    base, adapted = (evaluate_loss(session.base, examples, name) for name in (None, session.names[0]))
    print(compare(base, adapted), "; better:", int((adapted.losses < base.losses).sum()), "of", len(examples))
    before, after = (one.losses / one.weights for one in (base, adapted))
    made, axes = figure(5.6, 4.8)
    ends = 2.0, float(max(before.max(), after.max())) * 1.04
    axes.plot(ends, ends, color="#888888", linewidth=1)
    axes.scatter(before, after, s=18 * base.weights / base.weights.mean(), alpha=0.6, linewidth=0)
    axes.text(ends[1] * 0.98, 2.1, "below the line: the adapter is better", ha="right", color="#555555")
    axes.set(xlabel="loss of the base, nats per learned token", ylabel="loss of the adapter", aspect="equal")
    axes.set(xlim=ends, ylim=ends)
    axes.grid(alpha=0.25)
    save(made, "rows.png")


if __name__ == "__main__":
    main()
