"""Keys of transformers' Trainer, which LLaMA-Factory and ms-swift share, and the names of its optimizers and schedules.

Axolotl has the same names of optimizers and schedules under keys of its own.
"""

from collections.abc import Iterable
from typing import Any

from lorasmith.config.migrate.migration import OFF, Migration, words
from lorasmith.config.migrate.reading import scalar
from lorasmith.config.training import TRACKERS, UNUSED_BY

SAME = {
    "adam_beta1": "training.beta1",
    "adam_beta2": "training.beta2",
    "adam_epsilon": "training.eps",
    "gradient_accumulation_steps": "training.accumulate",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "learning_rate": "training.learning_rate",
    "logging_steps": "training.log_every",
    "max_grad_norm": "training.clip",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "save_total_limit": "training.keep_checkpoints",
    "seed": "training.seed",
    "weight_decay": "training.weight_decay",
}
MACHINE = (
    "bf16", "bf16_full_eval", "data_seed", "dataloader_drop_last", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_backend",
    "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_timeout", "deepspeed", "eval_accumulation_steps", "fp16",
    "fp16_full_eval", "fsdp", "fsdp_config", "full_determinism", "gradient_checkpointing_kwargs", "group_by_length",
    "label_names", "local_rank", "low_cpu_mem_usage", "per_device_eval_batch_size", "remove_unused_columns", "tf32",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "use_cpu",
    "use_liger_kernel",
)  # fmt: skip
FILES = (
    "disable_tqdm", "hub_token", "ignore_data_skip", "include_num_input_tokens_seen", "log_level", "logging_dir",
    "logging_first_step", "logging_strategy", "overwrite_cache", "overwrite_output_dir", "plot_loss", "run_name",
    "save_on_each_node", "save_only_model", "save_safetensors",
)  # fmt: skip
ALWAYS = (
    "do_eval",
    "do_train",
    "greater_is_better",
    "load_best_model_at_end",
    "metric_for_best_model",
    "eval_on_start",
)
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "linear": "linear",
}
ADAMW = (
    "adamw", "adamw_anyprecision", "adamw_apex_fused", "adamw_hf", "adamw_torch", "adamw_torch_fused", "paged_adamw",
    "paged_adamw_32bit",
)  # fmt: skip
OPTIMIZERS = {
    "adafactor": "adafactor",
    "lion": "lion",
    "lion_32bit": "lion",
    "lion_pytorch": "lion",
    "muon": "muon",
    "paged_lion_32bit": "lion",
}
DISABLED, OFFLINE = ("disabled",), ("dryrun", "local", "offline")  # modes of trackers
CREDENTIALS = ("swanlab_api_key", "swanlab_token")
TRACKER_OPTIONS = {"swanlab": ("swanlab_project", "swanlab_workspace", *CREDENTIALS)}
LINEAR = ("_proj", "fc1", "fc2", "c_attn", "c_fc", "dense", "query_key_value")  # ends of linear layers' names
NO_TRACKER = ("none", "None", "False")
STEPS = 500  # between two evaluations, where no key says it
LOW_BIT_ADAMW = (
    "adamw_8bit", "adamw_bnb_8bit", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_torch_fp8", "paged_adamw_8bit",
)  # fmt: skip


def trainer(migration: Migration) -> None:
    """Move the keys of the Trainer, except those of the schedule, optimizer, evaluation and saving."""
    migration.move(SAME)
    max_steps(migration)
    migration.ignore("machine", MACHINE)
    migration.ignore("files", FILES)
    migration.ignore("always", ALWAYS)
    trackers(migration, words(migration.take("report_to", [])), "report_to")
    if (checkpoint := migration.take("resume_from_checkpoint")) not in (None, False):
        migration.unmatch("resume", "resume_from_checkpoint", checkpoint)


def max_steps(migration: Migration) -> None:
    """The number of steps, where it is not left to the epochs."""
    if migration.left.get("max_steps") in (-1, 0):
        migration.ignore("default", ["max_steps"])
    migration.move({"max_steps": "training.max_steps"})


def shuffling(migration: Migration, keys: Iterable[str]) -> None:
    """Keys that are false only where the rows shall keep their order, which they never do here."""
    for key in keys:
        if migration.left.get(key) is False:
            migration.unmatch("none", key, False)
    migration.ignore("always", [key for key in keys if key in migration.left])


def trackers(migration: Migration, names: Iterable[str], key: str, value: Any = None) -> None:
    """The services that a training reports to; `value` is that of their key, if it is not the name of a service."""
    known = []
    for name in names:
        if name == "tensorboard":
            migration.put("training.tensorboard", True, key)
        elif name in TRACKERS:
            known += [name] if _is_sent(migration, name, key) else []
        elif name not in NO_TRACKER:
            migration.unmatch("trackers", key, name if value is None else value)
    if known:
        before = migration.value("training.report_to") or []
        migration.put("training.report_to", list(dict.fromkeys([*before, *known])), key)


def tracker_mode(migration: Migration, name: str) -> str:
    """How a service is used, such as offline, by its key or environment variable; "" if nothing says so."""
    foreign, key = migration.foreign, f"{name}_mode"
    if foreign.is_on(f"{name.upper()}_DISABLED"):
        return DISABLED[0]
    return str(foreign.values.get(key) or foreign.environment.get(key.upper(), ""))


def _is_sent(migration: Migration, name: str, key: str) -> bool:
    """Whether metrics shall be sent to a service that `key` names: not if it is switched off, or keeps them here."""
    mode, mode_key = tracker_mode(migration, name), f"{name}_mode"
    migration.take(mode_key)
    if mode in DISABLED:
        migration.ignore("inactive", [key, mode_key])
        return False
    for option in TRACKER_OPTIONS.get(name, ()):
        if (value := migration.take(option)) is not None:
            migration.unmatch("tracker_project", option, "..." if option in CREDENTIALS else value)
    if mode in OFFLINE:
        where = mode_key if mode_key in migration.foreign.values else mode_key.upper()
        migration.unmatch("tracker_mode", where, mode, variable=f"{mode_key.upper()}={mode}", tracker=name)
        return False
    return True


def beside_all_linear(migration: Migration, key: str, names: Iterable[str]) -> None:
    """Modules that their file names beside all linear layers, of which these are usually not part."""
    others = [name for name in names if not name.endswith(LINEAR)]
    if others:
        migration.unmatch("beside_all_linear", key, others)
    else:
        migration.ignore("default", [key])


def optimizer(migration: Migration, key: str = "optim") -> None:
    """AdamW by any of its names; in 8 or 4 bits it only needs less memory. Refuses what is no optimizer of ours."""
    name = migration.take(key)
    if name is None or name in ADAMW:
        migration.ignore("default", [key])
    elif name in LOW_BIT_ADAMW:
        migration.ignore("machine", [key])
    else:
        other_optimizer(migration, str(name), key)


def other_optimizer(migration: Migration, name: str, key: str) -> None:
    """Set an optimizer other than AdamW, without the options that it does not have; refuse it if it is none of ours."""
    if name not in OPTIMIZERS:
        migration.refuse("optimizer", key, name)
        return
    migration.put("training.optimizer", OPTIMIZERS[name], key)
    for option in UNUSED_BY.get(OPTIMIZERS[name], ()):
        migration.forget(f"training.{option}")


def schedule(migration: Migration, used: str, key: str, options: str, warmup: float = 0.0) -> None:
    """The schedule, its lowest learning rate, and the warmup.

    used: the schedule of the program if the key is not set or not ours; warmup: its warmup if no key says one.
    """
    name = migration.take(key)
    if name is not None and str(name) not in SCHEDULES:
        migration.unmatch("schedule", key, name, used=used)
    elif name is not None:
        migration.put("training.schedule", SCHEDULES[str(name)], key)
    more = migration.left.get(options)
    more = scalar(more) if isinstance(more, str) else more
    if isinstance(more, dict):
        migration.take(options)
        lowest_rate(migration, options, more.get("min_lr"), more.get("min_lr_rate"))
        if others := {name: value for name, value in more.items() if name not in ("min_lr", "min_lr_rate")}:
            migration.unmatch("none", options, others)
    _warmup(migration, name == "constant", warmup)


def lowest_rate(migration: Migration, key: str, rate: Any, share: Any = None) -> None:
    """The learning rate at the end of the schedule, as it is or as a share of the highest."""
    peak = migration.value("training.learning_rate")
    if rate is None and isinstance(share, int | float) and isinstance(peak, int | float):
        rate = share * peak
    if rate is not None and migration.value("training.schedule") != "constant":
        migration.put("training.min_learning_rate", rate, key)
    elif rate is not None or share is not None:
        migration.unmatch("none", key, share if rate is None else rate)


def _warmup(migration: Migration, is_constant: bool, otherwise: float) -> None:
    """Steps or fraction of the warmup; the Trainer's schedule `constant` has none, whatever the keys say."""
    found = {key: migration.take(key) for key in ("warmup_steps", "warmup_ratio")}
    given = {key: value for key, value in found.items() if value}
    if is_constant:
        for key, value in given.items():
            migration.unmatch("warmup_constant", key, value)
        given = {}
    for key, value in list(given.items())[:1]:  # the Trainer prefers the steps
        migration.put("training.warmup", value, key)
    migration.ignore("default", list(given)[1:])
    if not given:
        migration.default("training.warmup", 0.0 if is_constant else otherwise)


def evaluation(migration: Migration, strategy: Any, key: str = "eval_steps") -> None:
    """Evaluations by steps or per epoch.

    strategy: the program's default; key: the key that says how many steps if `eval_steps` does not.
    """
    strategy = migration.take("eval_strategy", migration.take("evaluation_strategy", strategy))
    if "eval_steps" in migration.left:
        key = "eval_steps"
    steps = migration.left.get(key)
    migration.take("eval_steps")
    if strategy == "epoch":
        migration.put("training.eval_every", "epoch", "eval_strategy")
    elif strategy == "steps" and steps is not None:
        _by_steps(migration, "training.eval_every", key, steps)
    elif strategy == "steps":
        migration.put("training.eval_every", migration.value("training.log_every") or STEPS, "eval_strategy")
    elif strategy in ("no", False):
        migration.ignore("default", ["eval_steps"])
    else:
        migration.unmatch("none", "eval_strategy", strategy)


def saving(migration: Migration) -> None:
    """Checkpoints by steps (500 in the Trainer), per epoch, or only at the end."""
    strategy, steps = migration.take("save_strategy", "steps"), migration.take("save_steps")
    if strategy == "epoch":
        migration.put("training.save_every", "epoch", "save_strategy")
    elif strategy in ("no", False):
        migration.put("training.save_every", 0, "save_strategy")
    elif strategy != "steps":
        migration.unmatch("none", "save_strategy", strategy)
    elif steps is not None:
        _by_steps(migration, "training.save_every", "save_steps", steps)


def _by_steps(migration: Migration, ours: str, key: str, steps: Any) -> None:
    """A number of steps; the Trainer reads one below 1 as a fraction of all steps, which are not known yet."""
    if isinstance(steps, float) and 0 < steps < 1:
        migration.unmatch("per_epoch", key, steps, ours=ours)
    else:
        migration.put(ours, int(steps) if isinstance(steps, float) and steps.is_integer() else steps, key)


def patience(migration: Migration, key: str) -> None:
    """Evaluations without a better loss after which the training stops."""
    value = migration.take(key)
    if value and not migration.value("training.eval_every"):
        migration.unmatch("patience", key, value)
    elif value:
        migration.put("training.patience", value, key)


_FORMATS = {
    ("load_in_4bit", True): "nf4", ("load_in_8bit", True): "int8", ("adapter", "qlora"): "nf4",
    ("quantization_bit", 4): "nf4", ("quantization_bit", 8): "int8",
    ("quant_bits", 4): "nf4", ("quant_bits", 8): "int8",
}  # fmt: skip
_BITSANDBYTES = (("quant_method", "bnb"), ("quantization_method", "bnb"))


def quantized(migration: Migration, keys: Iterable[str]) -> None:
    """Keys that quantize the base model: to 4 or 8 bits with bitsandbytes, unless the command line says how."""
    for key in keys:
        value = migration.take(key)
        if value is None or value in OFF or (key, value) in _BITSANDBYTES:
            continue
        if "quantize" in migration.given.get("model", {}):
            migration.unmatch("unquantized", key, value)
        elif isinstance(value, int | str) and (form := _FORMATS.get((key, value))):
            migration.put("model.quantize", form, key)
        else:
            migration.refuse("quantized", key, value)


def start(migration: Migration, key: str) -> None:
    """An adapter whose training is continued."""
    names = words(migration.take(key, []))
    if len(names) == 1:
        path = migration.path(names[0])
        migration.put("training.start_from", names[0] if path is None else str(path), key)
    elif names:
        migration.refuse("adapter", key, names)


def added_tokens(migration: Migration, *keys: str) -> None:
    """Tokens that are added to the vocabulary. A file of them is named, not read."""
    found: dict[str, str] = {}
    for key in keys:
        for token in words(migration.take(key, [])):
            if token.endswith(".txt"):
                migration.unmatch("added_tokens", key, token)
            else:
                found.setdefault(token, key)
    if found:
        migration.put("data.add_tokens", list(found), ", ".join(dict.fromkeys(found.values())))
