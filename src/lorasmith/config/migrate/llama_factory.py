"""LLaMA-Factory's configuration, and its dataset_info.json, which says what its names of datasets mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.config.files import read_object
from lorasmith.config.migrate import preference, trainer
from lorasmith.config.migrate.datasets import Datasets, base_model, not_first
from lorasmith.config.migrate.migration import Migration, words
from lorasmith.errors import ConfigError
from lorasmith.i18n import _, listed

NAME = "LLaMA-Factory"
SIGNATURE = frozenset({
    "additional_target", "cutoff_len", "dataset_dir", "finetuning_type", "lora_target", "neat_packing", "stage",
    "val_size",
})  # fmt: skip
SAME = {
    "cutoff_len": "data.max_length",
    "default_system": "data.system",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_rank": "lora.r",
    "loraplus_lr_ratio": "training.loraplus_lr_ratio",
    "output_dir": "output",
    "use_dora": "lora.use_dora",
    "use_rslora": "lora.use_rslora",
    "val_size": "data.held_out",
}
DEFAULTS = {
    "data.held_out": 0.0,
    "data.max_length": 2048,
    "lora.r": 8,
    "training.epochs": 3.0,
    "training.keep_checkpoints": 0,
    "training.learning_rate": 5e-5,
    "training.save_every": 500,
    "training.schedule": "linear",
}
MACHINE = (
    "buffer_size", "data_shared_file_system", "disable_gradient_checkpointing", "enable_liger_kernel", "flash_attn",
    "include_effective_tokens_per_second", "infer_backend", "infer_dtype", "kt_config", "kt_cpu_activation",
    "kt_optimize_rule", "offload_folder", "placement_strategy", "preprocessing_batch_size", "preprocessing_num_workers",
    "pure_bf16", "ray_init_kwargs", "ray_num_workers", "ray_run_name", "ray_storage_filesystem", "ray_storage_path",
    "resources_per_worker", "streaming", "upcast_layernorm", "upcast_lmhead_output", "use_cache",
    "use_fast_tokenizer", "use_kt", "use_reentrant_gc", "use_unsloth", "use_unsloth_gc", "use_v1_kernels",
)  # fmt: skip
FILES = ("cache_dir", "dataset_dir", "print_param_status", "tokenized_path")
INFERENCE = (
    "compute_accuracy", "do_predict", "do_sample", "eval_num_beams", "export_device", "export_dir",
    "export_legacy_format", "export_size", "max_new_tokens", "predict_with_generate", "temperature", "top_k", "top_p",
)  # fmt: skip
MEDIA = (
    "audio_sampling_rate", "crop_to_patches", "freeze_multi_modal_projector", "freeze_vision_tower", "image_max_pixels",
    "image_min_pixels", "media_dir", "video_fps", "video_max_pixels", "video_maxlen", "video_min_pixels",
)  # fmt: skip
QUANTIZATION = ("double_quantization", "quantization_device_map", "quantization_method", "quantization_type")
METHODS = (
    "freeze_language_model",
    "mixture_of_depths",
    "shift_attn",
    "train_from_scratch",
    "use_llama_pro",
)
LOSSES = ("use_asft_loss", "use_dft_loss", "use_eaft_loss")
OPTIMIZERS = ("use_adam_mini", "use_apollo", "use_badam", "use_galore")
# Beginnings of keys that have no effect if those of the method are taken.
OTHERS = ("ld_alpha", "ppo_", "pref_bco_weight", "pref_loss", "ref_model_quantization_bit", "reward_model")
PREFERENCE_LOSSES = {"sigmoid": "dpo", "orpo": "orpo", "simpo": "simpo"}
PREFERENCE = {
    "dpo_label_smoothing": "label_smoothing",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "pref_beta": "beta",
    "pref_ftx": "rpo_alpha",
    "simpo_gamma": "gamma",
}
PREFERENCE_DEFAULTS = {"beta": 0.1, "gamma": 0.5}
PISSA_ITER = 16  # LLaMA-Factory's default
TEMPLATES = {"alpaca": "alpaca", "chatml": "chatml", "default": "human-assistant"}
# Columns of dataset_info.json, as ours. A file of messages has them under the key of the format that it has.
COLUMNS = {
    "chosen": "chosen",
    "history": "history",
    "kto_tag": "kto_tag",
    "prompt": "instruction",
    "query": "input",
    "rejected": "rejected",
    "response": "output",
    "system": "system",
}
IN_MESSAGES = ("chosen", "kto_tag", "rejected", "system", "tools")  # columns beside the messages
FROM_MODELSCOPE = "USE_MODELSCOPE_HUB"  # the environment variable that says so
HUBS = {"hf_hub_url": "", "ms_hub_url": "modelscope:"}
MEDIA_COLUMNS = ("images", "videos", "audios")
PREFERENCE_COLUMNS = ("chosen", "rejected", "kto_tag")
TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function"),
    "system_tag": ("system",),
}


def convert(migration: Migration) -> None:
    """Move all keys of LLaMA-Factory."""
    is_text = migration.left.get("stage") == "pt"
    _method(migration)
    migration.move(SAME)
    base_model(migration, "model_name_or_path", "modelscope:" if migration.foreign.is_on(FROM_MODELSCOPE) else "")
    trainer.trainer(migration)
    if migration.take("use_swanlab"):
        trainer.trackers(migration, ["swanlab"], "use_swanlab")
    else:
        migration.ignore("inactive", [key for key in migration.left if key.startswith("swanlab_")])
    for ours, value in DEFAULTS.items():
        migration.default(ours, value)
    _lora(migration)
    if migration.left.get("use_muon"):
        migration.left["use_muon"] = "muon"
        migration.ignore("inactive", ["optim"])
        trainer.optimizer(migration, "use_muon")
    trainer.optimizer(migration)
    if migration.take("create_new_adapter") and (adapter := migration.take("adapter_name_or_path")):
        migration.refuse("new_adapter", "adapter_name_or_path", adapter)
    trainer.start(migration, "adapter_name_or_path")
    trainer.schedule(migration, "linear", "lr_scheduler_type", "lr_scheduler_kwargs")
    trainer.evaluation(migration, "no")
    trainer.saving(migration)
    trainer.patience(migration, "early_stopping_steps")
    _data(migration, is_text)
    _template(migration, is_text)
    migration.ignore("machine", MACHINE)
    migration.ignore("files", FILES)
    migration.ignore("inference", INFERENCE)
    migration.ignore("media", MEDIA)


@dataclass(frozen=True)
class Described:
    """A dataset of dataset_info.json: its name for us, and their name of each of our columns."""

    name: str
    columns: dict[str, str] = field(default_factory=dict)
    rows: int | None = None


def _method(migration: Migration) -> None:
    """What is trained, and on what. Refuses methods, stages and losses that are not ours."""
    if (tuning := migration.take("finetuning_type")) == "full":
        migration.put("training.method", "full", "finetuning_type")
    elif tuning not in (None, "lora"):
        migration.refuse("method", "finetuning_type", tuning)
    stage = migration.take("stage")
    if stage == "dpo":
        key = "pref_loss" if "pref_loss" in migration.left else "stage"
        loss = str(migration.take("pref_loss", "sigmoid"))
        if loss not in PREFERENCE_LOSSES:
            migration.refuse("loss", key, loss)
        preference.choose(migration, PREFERENCE_LOSSES.get(loss, "dpo"), key)
    elif stage == "kto":
        preference.choose(migration, "kto", "stage")
    elif stage not in (None, "sft", "pt"):
        migration.refuse("stage", "stage", stage)
    _preference(migration)
    trainer.quantized(migration, ["quantization_bit"])
    migration.ignore("inactive", QUANTIZATION)
    migration.refuse_all("method", METHODS)
    migration.refuse_all("loss", LOSSES)
    migration.refuse_all("optimizer", OPTIMIZERS)
    if migration.take("trust_remote_code"):
        migration.unmatch("remote_code", "trust_remote_code", True)


def _preference(migration: Migration) -> None:
    """The options of the loss on preferences, and its reference."""
    if preference.is_on(migration):
        migration.refuse_all("loss", ["ld_alpha", "pref_bco_weight"])
        if migration.value("training.method") in ("kto", "orpo"):
            migration.refuse_all("loss", ["pref_ftx"])
    preference.options(migration, PREFERENCE, PREFERENCE_DEFAULTS)
    preference.reference(migration, "ref_model", "ref_model_adapters", "model_name_or_path", "adapter_name_or_path")
    migration.ignore("inactive", [key for key in migration.left if key.startswith(OTHERS)])


def _lora(migration: Migration) -> None:
    """The modules, and alpha, which is twice the rank if it is not set."""
    targets = words(migration.take("lora_target", []))
    if targets:
        migration.put("lora.target_modules", "all-linear" if targets == ["all"] else targets, "lora_target")
    if extra := words(migration.take("additional_target", [])):
        migration.put("lora.modules_to_save", extra, "additional_target")
    if migration.take("pissa_init"):
        niter = migration.take("pissa_iter", PISSA_ITER)
        migration.put("lora.init_lora_weights", "pissa" if niter == -1 else f"pissa_niter_{niter}", "pissa_init")
        migration.ignore("always", ["pissa_convert"])
    else:
        migration.ignore("inactive", ["pissa_iter", "pissa_convert"])
    rank = migration.value("lora.r")
    migration.default("lora.lora_alpha", 2 * rank if isinstance(rank, int) else 16)


def _data(migration: Migration, is_text: bool) -> None:
    """The datasets, what is learned of them, and the keys about reading them."""
    folder = str(migration.take("dataset_dir", "data"))
    train = Datasets(migration, "dataset")
    held_out = Datasets(migration, "eval_dataset", train.columns)
    for datasets in (train, held_out):
        for name in words(migration.take(datasets.key, [])):
            found = _described(datasets, folder, name, is_text)
            if found is not None:
                datasets.add(found.name, found.columns, found.rows)
    if (most := migration.take("max_samples")) is not None:
        migration.put("data.max_samples", most, "max_samples", not_first())
    train.move()
    held_out.hold_out()
    if migration.take("train_on_prompt"):
        migration.put("data.learn", "all", "train_on_prompt")
    if migration.take("mask_history"):
        migration.put("data.learn", "last-answer", "mask_history")
    for key in ("packing", "neat_packing"):
        if (value := migration.take(key)) and not is_text:
            migration.unmatch("packing", key, value)
    migration.default("data.too_long", "split" if is_text else "truncate")


def _template(migration: Migration, is_text: bool) -> None:
    """The chat template: the model's own instead of LLaMA-Factory's copy of it."""
    if (thinking := migration.take("enable_thinking")) is not None:
        migration.put("data.template_kwargs", {"enable_thinking": thinking}, "enable_thinking")
    trainer.added_tokens(migration, "add_tokens", "add_special_tokens")
    migration.ignore("default", ["resize_vocab"])
    name = migration.take("template")
    if is_text or name is None:
        migration.ignore("default", ["template"])
    elif str(name) in TEMPLATES:
        migration.put("data.template", TEMPLATES[str(name)], "template")
    else:
        note = _("lorasmith uses the chat template of the model itself")
        migration.put("data.template", "model", f"template: {name}", note)


def _described(datasets: Datasets, folder: str, name: str, is_text: bool) -> Described | None:
    """What dataset_info.json says about a name; None if it cannot be used, which is reported."""
    if folder == "ONLINE":
        return Described(name)
    migration = datasets.migration
    found = migration.path(f"{folder}/dataset_info.json")
    if found is None:
        there = listed(dict.fromkeys([folder, str(migration.foreign.path.parent / folder)]))
        datasets.refuse("dataset_info", name, folders=there)
        return None
    entry = read_object(found, ConfigError).get(name)
    if not isinstance(entry, dict) or not isinstance(entry.get("columns", {}), dict):
        datasets.refuse("dataset_unknown", name, file=found)
        return None
    columns = {key: theirs for key, theirs in entry.get("columns", {}).items() if theirs is not None}
    is_preference = entry.get("ranking") or any(key in columns for key in PREFERENCE_COLUMNS)
    for reason, is_so in (
        ("no_preference", is_preference and not preference.is_on(migration)),
        ("media", any(key in columns for key in MEDIA_COLUMNS)),
    ):
        if is_so:
            datasets.refuse(reason, name)
            return None
    place = _place(found.parent, entry, migration.foreign.is_on(FROM_MODELSCOPE))
    if place is None:
        datasets.refuse("dataset_kind", name)
        return None
    if datasets.lacks(f"{name}.split", entry.get("split")):
        return None
    _tell_unknown(migration, name, entry)
    rows = entry.get("num_samples")
    return Described(place, _columns(migration, name, entry, columns, is_text), rows if isinstance(rows, int) else None)


def _place(folder: Path, entry: Mapping[str, Any], is_modelscope: bool) -> str | None:
    """The file or hub name of a dataset, of both hubs the one that is in use; None for what we do not read."""
    if isinstance(file := entry.get("file_name"), str):
        return str(folder / file)
    for key in sorted(HUBS, reverse=is_modelscope):
        if isinstance(name := entry.get(key), str) and "/" in name:
            return f"{HUBS[key]}{name}" + (f":{entry['subset']}" if entry.get("subset") else "")
    return None


def _columns(
    migration: Migration, name: str, entry: Mapping[str, Any], columns: Mapping[str, Any], is_text: bool
) -> dict[str, str]:
    """Their name of each of our columns."""
    if entry.get("formatting", "alpaca") == "alpaca":
        if is_text:
            return {"text": str(columns.get("prompt", "instruction"))}
        if "tools" in columns:
            migration.unmatch("column", f"{name}.columns.tools", columns["tools"])
        found = {COLUMNS[key]: str(theirs) for key, theirs in columns.items() if key in COLUMNS}
    else:
        messages = str(columns.get("messages", "conversations" if entry["formatting"] == "sharegpt" else "messages"))
        ours = messages if messages in ("messages", "conversations") else "conversations"
        found = {ours: messages}
        found |= {key: str(theirs) for key, theirs in columns.items() if key in IN_MESSAGES}
        tags = entry.get("tags")
        for tag, theirs in (tags if isinstance(tags, dict) else {}).items():
            if tag in TAGS and theirs not in TAGS[tag]:
                migration.unmatch("roles", f"{name}.tags.{tag}", theirs)
    return found


def _tell_unknown(migration: Migration, name: str, entry: Mapping[str, Any]) -> None:
    """Report what an entry asks for and we do not do."""
    if (split := entry.get("split", "train")) != "train":
        migration.unmatch("data_part", f"{name}.split", split)
    for key in ("folder", "script_url", "cloud_file_name"):
        if entry.get(key):
            migration.unmatch("none", f"{name}.{key}", entry[key])
