"""Files of small studies, whose runs take a fifth of a second, and results of studies that were not trained."""

from pathlib import Path

import torch

from lorasmith.config.study import Study, load_study
from lorasmith.evaluation.loss import Comparison, compare
from lorasmith.runs.study.cells import Losses, Measured
from lorasmith.runs.study.result import CellResult, StudyResult, combined
from tests.support.tiny import model_folder, rows_file

GRID = '"lora.r" = [1, 4]\n"training.learning_rate" = [1e-3, 1e-2]\n"training.seed" = [0, 1]'


def study_file(folder: Path, grid: str = GRID, training: str = "", data: str = "", more: str = "") -> Path:
    """A file in `folder` of a study with this grid, in the folder `out` beside it."""
    file = folder / "small.toml"
    file.write_text(
        f"""output = "{folder / "out"}"
[model]
model = "{model_folder()}"
dtype = "float32"
[data]
data = ["{rows_file(folder / "rows.jsonl", range(40))}"]
held_out = 12
{data}
[training]
batch_size = 4
max_steps = 3
warmup = 0
{training}
{more}
[study.grid]
{grid}
""",
        "utf-8",
    )
    return file


def small_study(folder: Path, grid: str = GRID, training: str = "", data: str = "", more: str = "") -> Study:
    """The study of `study_file`."""
    return load_study(study_file(folder, grid, training, data, more))


def made_up(
    losses: dict[str, dict[float, list[float | None]]], examples: int = 60, forgot: float = 0.05
) -> StudyResult:
    """The result of a study that was not trained: the held-out loss by method, learning rate and seed; None failed.

    The losses of the examples differ by a noise of 0.01, whose mean is zero.
    """
    measured, cells = dict[str, Measured](), list[CellResult]()
    for method, rates in losses.items():
        for rate, values in rates.items():
            for seed, loss in enumerate(values):
                name = f"{method}_lr{rate:g}_seed{seed}"
                options = {"lora.init_lora_weights": method, "training.learning_rate": rate, "training.seed": seed}
                if loss is None:
                    cells.append(CellResult(name, options, seed, "failed", problems=("step 2: loss nan, not finite",)))
                    continue
                general = Comparison(3.1, 3.1 + forgot, forgot - 0.01, forgot + 0.01, 48)
                held_out = _losses(3.0, loss, seed, examples)
                measured[name] = Measured(base="same", held_out=held_out)
                compared = compare(*held_out.pair)
                cells.append(
                    CellResult(name, options, seed, "finished", compared, general, {}, 300, 61.0, 1200.0, 1500.0, 4096)
                )
    about = {"processor": "A processor", "cores": "2", "threads": "2", "lorasmith": "0.3", "torch": "2", "python": "3"}
    return combined("made up", "tiny", ("rows.jsonl",), examples, "training.learning_rate", cells, measured, about)


def _losses(before: float, after: float, seed: int, examples: int) -> Losses:
    generator = torch.Generator().manual_seed(seed + int(after * 1e6))
    noise_SE = 0.01 * torch.randn(2, examples, generator=generator, dtype=torch.float64)
    noise_SE -= noise_SE.mean(1, keepdim=True)
    return Losses([1.0] * examples, (before + noise_SE[0]).tolist(), (after + noise_SE[1]).tolist())
