"""mlx-lm's LoRA configuration. It counts iterations, of which `grad_accumulation_steps` make one step."""

from typing import Any

from lorasmith.config.migrate import trainer
from lorasmith.config.migrate.datasets import Datasets, base_model, first_rows, local_or_hub
from lorasmith.config.migrate.migration import Migration, words
from lorasmith.config.migrate.reasons import unmatched

NAME = "mlx-lm"
SIGNATURE = frozenset({
    "adapter_path", "fine_tune_type", "grad_checkpoint", "iters", "lora_layers", "lora_parameters", "lr_schedule",
    "mask_prompt", "max_seq_length", "num_layers", "steps_per_eval", "steps_per_report", "val_batches",
})  # fmt: skip
SAME = {
    "adapter_path": "output",
    "batch_size": "training.batch_size",
    "grad_accumulation_steps": "training.accumulate",
    "grad_checkpoint": "training.gradient_checkpointing",
    "learning_rate": "training.learning_rate",
    "max_seq_length": "data.max_length",
    "seed": "training.seed",
}
DEFAULTS = {
    "data.learn": "all",
    "data.max_length": 2048,
    "data.too_long": "truncate",
    "lora.r": 8,
    "training.batch_size": 4,
    "training.clip": 0.0,
    "training.learning_rate": 1e-5,
    "training.schedule": "constant",
}
ITERATIONS = {  # converted to steps
    "iters": "training.max_steps",
    "save_every": "training.save_every",
    "steps_per_eval": "training.eval_every",
    "steps_per_report": "training.log_every",
}
ITERATION_DEFAULTS = {"iters": 1000, "save_every": 100, "steps_per_eval": 200, "steps_per_report": 10}
SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}
SCALE, LAYERS = 20.0, 16
ONE_STEP = 1  # that their schedule waits between the warmup and the decay
MACHINE = ("clear_cache_threshold", "val_batches")
FILES = ("project_name",)
ALWAYS = ("test", "test_batches", "train")


def convert(migration: Migration) -> None:
    """Move all keys of mlx-lm."""
    _method(migration)
    _data(migration)
    migration.move(SAME)
    base_model(migration, "model")
    _steps(migration)
    for ours, value in DEFAULTS.items():
        migration.default(ours, value)
    _lora(migration)
    _optimizer(migration)
    _schedule(migration)
    trainer.trackers(migration, words(migration.take("report_to", [])), "report_to")
    migration.ignore("machine", MACHINE)
    migration.ignore("files", FILES)
    migration.ignore("always", ALWAYS)


def _method(migration: Migration) -> None:
    """What is trained. Refuses what is neither a new adapter nor all weights."""
    method = migration.take("fine_tune_type", "lora")
    if method == "dora":
        migration.put("lora.use_dora", True, "fine_tune_type")
    elif method == "full":
        migration.put("training.method", "full", "fine_tune_type")
        migration.unmatch("blocks", "num_layers", migration.left.get("num_layers", LAYERS))
    elif method != "lora":
        migration.refuse("method", "fine_tune_type", method)
    migration.refuse_all("adapter", ["resume_adapter_file"])
    model = str(migration.foreign.values.get("model", ""))
    if model.startswith("mlx-community/"):
        migration.unmatched[f"model: {model}"] = unmatched("mlx_model")
    if migration.take("trust_remote_code"):
        migration.unmatch("remote_code", "trust_remote_code", True)


def _steps(migration: Migration) -> None:
    """The numbers of iterations, as steps."""
    size = migration.value("training.accumulate")
    size = size if isinstance(size, int) and size > 0 else 1
    for key, ours in ITERATIONS.items():
        iterations = migration.take(key)
        if isinstance(iterations, int) and iterations > 0:
            iterations = max(1, iterations // size)
        if iterations is not None:
            migration.put(ours, iterations, key)
        if key != "steps_per_eval" or migration.value("data.held_out"):
            migration.default(ours, max(1, ITERATION_DEFAULTS[key] // size))


def _lora(migration: Migration) -> None:
    """Rank, the factor of the update (alpha / r for us), the modules and the layers."""
    keys = ("lora_parameters.rank", "lora_parameters.dropout", "lora_parameters.keys")
    migration.take_part("lora_parameters")
    ours = ("lora.r", "lora.lora_dropout", "lora.target_modules")
    migration.move(dict(zip(keys, ours, strict=True)))
    alpha, scale = migration.take("lora_parameters.alpha"), migration.take("lora_parameters.scale")
    rank = migration.value("lora.r")
    if isinstance(scale, int | float) and isinstance(rank, int):
        migration.put("lora.lora_alpha", float(scale * rank), "lora_parameters.scale", f"{scale:g} * {rank}")
    elif scale is not None:
        migration.put("lora.lora_alpha", scale, "lora_parameters.scale")
    elif alpha is not None:
        migration.put("lora.lora_alpha", alpha, "lora_parameters.alpha")
    elif isinstance(rank, int):
        migration.default("lora.lora_alpha", SCALE * rank)
    key = "lora_layers" if "lora_layers" in migration.left else "num_layers"
    layers = migration.take(key)
    if layers == -1:
        migration.ignore("default", [key])
    elif layers is not None:
        migration.put("lora.last_layers", layers, key)
    else:
        migration.default("lora.last_layers", LAYERS)


def _optimizer(migration: Migration) -> None:
    """Adam and AdamW; Adam decays no weights."""
    name = str(migration.take("optimizer", "adam")).lower()
    migration.take_part("optimizer_config")
    options = migration.take(f"optimizer_config.{name}")
    options = dict(options) if isinstance(options, dict) else {}
    migration.ignore("inactive", [key for key in migration.left if key.startswith("optimizer_config.")])
    if name not in ("adam", "adamw"):
        trainer.other_optimizer(migration, name, "optimizer")
    betas = options.pop("betas", None)
    if isinstance(betas, list) and len(betas) == 2:
        for ours, value in zip(("training.beta1", "training.beta2"), betas, strict=True):
            migration.put(ours, value, "optimizer_config")
    for theirs, ours in (("eps", "training.eps"), ("weight_decay", "training.weight_decay")):
        if theirs in options:
            migration.put(ours, options.pop(theirs), "optimizer_config")
    if not options.pop("bias_correction", True):
        options["bias_correction"] = False
    if options:
        migration.unmatch("none", "optimizer_config", options)
    migration.default("training.weight_decay", 0.01 if name == "adamw" else 0.0)


def _schedule(migration: Migration) -> None:
    """The schedule with its warmup: `arguments` are the first learning rate, the steps, and the last learning rate."""
    part = migration.left.get("lr_schedule")
    migration.default("training.warmup", 0.0)
    if not isinstance(part, dict):
        return
    migration.take("lr_schedule")
    name, arguments = str(part.get("name")), part.get("arguments")
    arguments = arguments if isinstance(arguments, list) else []
    if name not in SCHEDULES:
        migration.unmatch("schedule", "lr_schedule", f"{name} {arguments}", used="constant")
    else:
        migration.put("training.schedule", SCHEDULES[name], "lr_schedule")
        first, last, length = _ends(name, arguments)
        if first is not None:
            migration.put("training.learning_rate", first, "lr_schedule.arguments")
        if last:
            trainer.lowest_rate(migration, "lr_schedule.arguments", last)
        _length(migration, length, part.get("warmup") or 0)
    migration.put("training.warmup", part.get("warmup") or 0, "lr_schedule.warmup")
    if part.get("warmup_init"):
        migration.unmatch("none", "lr_schedule.warmup_init", part["warmup_init"])


def _length(migration: Migration, length: Any, warmup: Any) -> None:
    """Tell the steps of a schedule that does not end with the training, as ours does."""
    steps = migration.value("training.max_steps")
    if not all(isinstance(number, int | float) for number in (length, warmup, steps)):
        return
    if abs(length + warmup - steps) > ONE_STEP:
        values = {"length": length, "warmup": warmup, "steps": steps}
        migration.unmatch("schedule_length", "lr_schedule.arguments", length, **values)


def _ends(name: str, arguments: list[Any]) -> tuple[Any, Any, Any]:
    """First and last learning rate of a schedule, and the steps between them; None where it does not say."""
    last, length = (2, 1) if name == "cosine_decay" else (1, 2)
    padded = [*arguments, None, None, None]
    return padded[0], padded[last], padded[length]


def _data(migration: Migration) -> None:
    """The folder with train.jsonl and valid.jsonl, or a dataset on the hub."""
    datasets = Datasets(migration, "data")
    if (entry := migration.take("hf_dataset")) is not None:
        _hub(Datasets(migration, "hf_dataset"), entry)
        migration.ignore("default", ["data"])
    elif (name := migration.take("data")) is not None:
        folder = migration.path(str(name))
        if folder is None:
            datasets.add(local_or_hub(migration, str(name)), {})
        elif not (folder / "train.jsonl").is_file():
            datasets.refuse("dataset_kind", name)
        else:
            datasets.add(str(folder / "train.jsonl"), {})
            if (folder / "valid.jsonl").is_file():
                migration.put("data.held_out", str(folder / "valid.jsonl"), "data")
        datasets.move()
    migration.default("data.held_out", 0.0)
    if migration.take("mask_prompt"):
        migration.put("data.learn", "last-answer", "mask_prompt")


def _hub(datasets: Datasets, entries: Any) -> None:
    """Datasets of `hf_dataset`, with the names of their columns."""
    migration = datasets.migration
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            datasets.refuse("dataset_kind", entry)
            continue
        features = {
            "chat_feature": "messages",
            "completion_feature": "completion",
            "prompt_feature": "prompt",
            "text_feature": "text",
        }
        columns = {ours: str(entry[theirs]) for theirs, ours in features.items() if entry.get(theirs)}
        datasets.add(local_or_hub(migration, entry["path"]), columns, first_rows(entry.get("train_split")), True)
        for key, value in entry.items():
            if key not in ("path", *features) and value and not (key == "train_split" and first_rows(value)):
                reason = "data_part" if key.endswith("_split") else "none"
                migration.unmatch(reason, f"hf_dataset.{key}", value)
    datasets.move()
