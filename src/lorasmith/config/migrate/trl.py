"""TRL's configuration: a YAML file for its command line, or a shell script that runs one of its trainers.

A file does not say which trainer it is for, `trl sft` or `trl dpo`, so that follows from the keys that only one has.
"""

from collections.abc import Mapping
from typing import Any

from lorasmith.config.migrate import preference, trainer
from lorasmith.config.migrate.datasets import Datasets, base_model, first_rows, local_or_hub
from lorasmith.config.migrate.migration import Migration, shown, words
from lorasmith.i18n import _

NAME = "TRL"
SIGNATURE = frozenset({
    "assistant_only_loss", "attn_implementation", "chat_template_path", "completion_only_loss", "dataset_config",
    "dataset_name", "dataset_test_split", "dataset_text_field", "dataset_train_split", "eos_token", "lora_task_type",
    "max_prompt_length", "model_name_or_path", "test_split_size", "truncation_mode", "use_peft",
})  # fmt: skip
SAME = {
    "dtype": "model.dtype",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_modules_to_save": "lora.modules_to_save",
    "lora_r": "lora.r",
    "lora_target_parameters": "lora.target_parameters",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "output_dir": "output",
    "test_split_size": "data.held_out",
    "torch_dtype": "model.dtype",
    "use_dora": "lora.use_dora",
    "use_rslora": "lora.use_rslora",
}
DEFAULTS = {
    "data.held_out": 0.0,
    "data.max_length": 1024,
    "lora.lora_alpha": 32,
    "lora.lora_dropout": 0.05,
    "lora.r": 16,
    "training.epochs": 3.0,
    "training.gradient_checkpointing": True,
    "training.keep_checkpoints": 0,
    "training.log_every": 10,
    "training.save_every": 500,
    "training.schedule": "linear",
}
RATE, PREFERENCE_RATE = 2e-5, 1e-6
PREFERENCE = {
    "beta": "beta",
    "cpo_alpha": "rpo_alpha",
    "desirable_weight": "desirable_weight",
    "label_smoothing": "label_smoothing",
    "rpo_alpha": "rpo_alpha",
    "simpo_gamma": "gamma",
    "undesirable_weight": "undesirable_weight",
}
PREFERENCE_DEFAULTS = {"beta": 0.1}
SIMPO_DEFAULTS = {"beta": 0.1, "gamma": 0.5, "rpo_alpha": 1.0}
# Keys, and values of loss_type, that only one trainer has; a key that several have comes last.
OF_TRAINER = {
    "kto": ("desirable_weight", "undesirable_weight"),
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "sft": ("assistant_only_loss", "completion_only_loss", "dataset_text_field", "eos_token", "packing"),
    "dpo": ("beta", "label_smoothing", "ld_alpha", "loss_weights", "max_prompt_length", "precompute_ref_log_probs",
            "rpo_alpha", "sync_ref_model"),
}  # fmt: skip
LOSSES_OF_TRAINER = {"apo_zero_unpaired": "kto", "chunked_nll": "sft", "dft": "sft", "kto": "kto", "nll": "sft",
                     "simpo": "cpo"}  # fmt: skip
SFT_LOSSES = ("chunked_nll", "nll")
OTHER_LOSSES = ("f_divergence_type", "ld_alpha", "reference_free", "use_weighting")
REWARDS = ("num_generations", "reward_funcs", "reward_model_name_or_path", "reward_model_path")
MACHINE = (
    "activation_offloading", "attn_implementation", "bnb_4bit_quant_storage", "dataset_num_proc", "dataset_streaming",
    "eval_packing", "packing_strategy", "pad_to_multiple_of", "padding_free", "precompute_ref_batch_size",
    "precompute_ref_log_probs", "streaming", "use_bnb_nested_quant",
)  # fmt: skip
FILES = (
    "dataset_kwargs", "env", "hub_model_id", "hub_model_revision", "hub_private_repo", "hub_strategy", "push_to_hub",
    "push_to_hub_revision", "trackio_space_id",
)  # fmt: skip
INACTIVE = ("discopop_tau", "f_alpha_divergence_coef", "ref_model_mixup_alpha", "ref_model_sync_steps")
MIXTURES = ("dataset_mixer", "dataset_mixture")  # of the alignment handbook
TOO_LONG = {"keep_end": "truncate-left", "keep_start": "truncate"}


def convert(migration: Migration) -> None:
    """Move all keys of TRL."""
    _method(migration)
    migration.move(SAME)
    base_model(migration, "model_name_or_path")
    trainer.trainer(migration)
    is_preference = preference.is_on(migration)
    migration.default("training.learning_rate", PREFERENCE_RATE if is_preference else RATE)
    for ours, value in DEFAULTS.items():
        migration.default(ours, value)
    _modules(migration)
    trainer.optimizer(migration)
    trainer.schedule(migration, "linear", "lr_scheduler_type", "lr_scheduler_kwargs")
    strategy = migration.left.get("eval_strategy", migration.left.get("evaluation_strategy", "no"))
    if strategy not in ("no", False) and not migration.value("data.held_out"):
        migration.unmatch("held_out_part", "dataset_test_split", migration.left.get("dataset_test_split", "test"))
    migration.ignore("inactive", [key for key in ("dataset_test_split",) if key in migration.left])
    trainer.evaluation(migration, "no")
    trainer.saving(migration)
    _data(migration)
    _text(migration, is_preference)
    migration.ignore("machine", MACHINE)
    migration.ignore("files", FILES)
    migration.ignore("inactive", INACTIVE)


def _method(migration: Migration) -> None:
    """What is trained, and on what. Refuses trainers and losses that are not ours."""
    if migration.left.get("use_peft"):
        migration.ignore("default", ["use_peft"])
    elif (use := migration.take("use_peft")) is not None:
        migration.put("training.method", "full", "use_peft", f"use_peft: {use}")
    else:
        migration.default("training.method", "full")
    migration.refuse_all("stage", REWARDS)
    _loss(migration)
    trainer.quantized(migration, ["load_in_4bit", "load_in_8bit"])
    if (kind := migration.take("bnb_4bit_quant_type", "nf4")) != "nf4":
        migration.unmatch("none", "bnb_4bit_quant_type", kind)
    if migration.take("trust_remote_code"):
        migration.unmatch("remote_code", "trust_remote_code", True)
    if (task := migration.take("lora_task_type", "CAUSAL_LM")) != "CAUSAL_LM":
        migration.refuse("task", "lora_task_type", task)
    if migration.left.get("model_revision") == "main":
        migration.ignore("default", ["model_revision"])


def _loss(migration: Migration) -> None:
    """The trainer, its loss, and the options of that; all are TRL's defaults where the file does not say them."""
    losses = words(migration.left.get("loss_type", []))
    name, key = migration.foreign.verb or _trainer(migration, losses), next(iter(_marks(migration)), "trl")
    method = "simpo" if name == "cpo" else name
    if method == "sft":
        if losses and set(losses) <= set(SFT_LOSSES):
            migration.ignore("default", ["loss_type"])
        migration.refuse_all("loss", ["loss_type"])
    else:
        if name == "cpo" and losses != ["simpo"]:
            migration.refuse("loss", "loss_type", migration.take("loss_type", "sigmoid"))
        preference.choose(migration, method, "trl" if migration.foreign.verb else key)
        preference.trl_losses(migration, "loss_type", "loss_weights")
        if migration.left.get("f_divergence_type") == "reverse_kl":
            migration.ignore("default", ["f_divergence_type"])
        migration.refuse_all("loss", OTHER_LOSSES)
        migration.refuse_all("reference", ["sync_ref_model"])
    preference.options(migration, PREFERENCE, SIMPO_DEFAULTS if method == "simpo" else PREFERENCE_DEFAULTS)


def _marks(migration: Migration) -> dict[str, str]:
    """The keys of the file that only one trainer has, with that trainer."""
    return {key: name for name, keys in OF_TRAINER.items() for key in keys if key in migration.left}


def _trainer(migration: Migration, losses: list[str]) -> str:
    """The trainer that a file is for, by its keys; reported if they may be those of another one too."""
    if losses:
        return LOSSES_OF_TRAINER.get(losses[0], "dpo")
    name = next(iter(_marks(migration).values()), "")
    if name in ("", "dpo"):  # SFT has no keys that it needs, and ORPO has those of DPO
        name = name or "sft"
        migration.unmatch("trl_trainer", "trl", _("not set"), trainer=name.upper())
    return name


def _modules(migration: Migration) -> None:
    """The modules to adapt, which TRL leaves to PEFT if none are named."""
    targets = words(migration.take("lora_target_modules", []))
    if targets:
        migration.put(
            "lora.target_modules", "all-linear" if targets == ["all-linear"] else targets, "lora_target_modules"
        )
    elif migration.value("training.method") != "full":
        migration.unmatch("peft_targets", "lora_target_modules", _("not set"))


def _data(migration: Migration) -> None:
    """The dataset, or the mixture of several."""
    train = Datasets(migration, "datasets" if "datasets" in migration.left else "dataset_name")
    for key in MIXTURES:
        if (mixture := migration.take(key)) is not None:
            train.refuse("dataset_kind", f"{key}: {shown(mixture)}")
    entries = migration.take("datasets")
    name, subset = migration.take("dataset_name"), migration.take("dataset_config")
    split = migration.take("dataset_train_split")
    if entries is None and name is not None:
        entries = [{"path": name, "name": subset, "split": split}]
    for number, entry in enumerate(entries if isinstance(entries, list) else [], 1):
        if isinstance(entry, dict) and isinstance(entry.get("path"), str):
            _dataset(train, f"datasets[{number}]" if train.key == "datasets" else "dataset_name", entry)
        else:
            train.refuse("dataset_kind", entry)
    if field := migration.take("dataset_text_field"):
        train.columns |= {"text": str(field)} if field != "text" else {}
    train.move()


def _dataset(datasets: Datasets, where: str, entry: Mapping[str, Any]) -> None:
    """One dataset: a file or folder that is found, or its name on the hub with its configuration."""
    migration = datasets.migration
    files = [str(path) for file in words(entry.get("data_files") or []) if (path := migration.path(file)) is not None]
    for key, value in entry.items():
        is_done = key in ("columns", "name", "path") or (key == "data_files" and files) or value in (None, "train")
        if not is_done and not (key == "split" and first_rows(value)):
            migration.unmatch(
                "data_part", "dataset_train_split" if where == "dataset_name" else f"{where}.{key}", value
            )
    place = local_or_hub(migration, entry["path"])
    for name in files or [f"{place}:{entry['name']}" if entry.get("name") else place]:
        datasets.add(name, {}, first_rows(entry.get("split")), are_first=True)


def _text(migration: Migration, is_preference: bool) -> None:
    """The template, what is learned, and what is too long."""
    for key in ("chat_template", "chat_template_path"):
        template = migration.take(key)
        file = migration.path(str(template)) if str(template).endswith(".jinja") else None
        if file is not None:
            migration.put("data.template", str(file), key)
        elif template is not None:
            migration.unmatch("template", key, template)
    migration.ignore("stop", ["eos_token", "pad_token"])
    only = {key: migration.take(key) for key in ("assistant_only_loss", "completion_only_loss")}
    given = {key: value for key, value in only.items() if value is not None}
    if any(given.values()):
        migration.put("data.learn", "answers", next(key for key, value in given.items() if value))
    elif "completion_only_loss" in given and not is_preference:
        migration.put("data.learn", "all", "completion_only_loss")
    elif not is_preference:
        migration.unmatch("trl_learn", "assistant_only_loss", given.get("assistant_only_loss", _("not set")))
    if is_preference and migration.left.get("truncation_mode") == "keep_end":
        migration.unmatch("keep_end", "truncation_mode", migration.take("truncation_mode"))
    if (mode := migration.take("truncation_mode")) is not None:
        migration.put("data.too_long", TOO_LONG.get(str(mode), mode), "truncation_mode")
    migration.default("data.too_long", "truncate")
    if packing := migration.take("packing"):
        migration.unmatch("packing", "packing", packing)
