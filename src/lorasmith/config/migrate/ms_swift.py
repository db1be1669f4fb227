"""ms-swift's configuration: a YAML file, the args.json that it writes beside its checkpoints, or its command."""

from collections.abc import Mapping

from lorasmith.config.files import read_text
from lorasmith.config.lora import is_start
from lorasmith.config.migrate import ms_swift_preference, preference, trainer
from lorasmith.config.migrate.datasets import Datasets, base_model, local_or_hub
from lorasmith.config.migrate.migration import Migration, words
from lorasmith.config.migrate.reading import scalar
from lorasmith.errors import ConfigError
from lorasmith.i18n import _, listed

NAME = "ms-swift"
SIGNATURE = frozenset({
    "loss_scale", "model_author", "sft_type", "split_dataset_ratio", "swift_version", "target_modules", "train_type",
    "truncation_strategy", "tuner_backend", "tuner_type", "val_dataset",
})  # fmt: skip
SAME = {
    "lora_alpha": "lora.lora_alpha",
    "lora_bias": "lora.bias",
    "lora_dropout": "lora.lora_dropout",
    "lora_rank": "lora.r",
    "lorap_lr_ratio": "training.loraplus_lr_ratio",
    "max_epochs": "training.epochs",
    "max_length": "data.max_length",
    "modules_to_save": "lora.modules_to_save",
    "output_dir": "output",
    "split_dataset_ratio": "data.held_out",
    "torch_dtype": "model.dtype",
    "use_dora": "lora.use_dora",
    "use_rslora": "lora.use_rslora",
}
DEFAULTS = {
    "data.held_out": 0.0,
    "data.too_long": "drop",
    "lora.lora_alpha": 32,
    "lora.lora_dropout": 0.05,
    "lora.r": 8,
    "training.batch_size": 1,
    "training.beta2": 0.95,
    "training.epochs": 3.0,
    "training.keep_checkpoints": 0,
    "training.save_every": 500,
    "training.schedule": "cosine",
    "training.weight_decay": 0.1,
}
RATE, FULL_RATE = 1e-4, 1e-5  # learning rates of adapters and of all weights
TOTAL_BATCH = 16  # examples per step from which ms-swift computes an accumulation that is not set
TOO_LONG = {"delete": "drop", "left": "truncate-left", "right": "truncate", "split": "split"}
LEARN = {"default": "answers", "last_round": "last-answer", "all": "all"}
COLUMNS = {
    "chosen": "chosen", "conversations": "conversations", "history": "history", "input": "input",
    "instruction": "instruction", "label": "label", "messages": "messages", "output": "output", "prompt": "instruction",
    "query": "instruction", "rejected": "rejected", "rejected_response": "rejected_response",
    "response": "output", "system": "system", "text": "text", "tools": "tools",
}  # fmt: skip
MACHINE = (
    "acc_strategy", "attn_impl", "callbacks", "dataset_num_proc", "ddp_static_graph", "device_groups", "device_map",
    "ds3_gather_for_generation", "enable_npu_model_patch", "experts_impl", "lazy_tokenize", "load_args",
    "load_data_args", "lora_dtype", "max_memory", "model_type", "nproc_per_node", "packing_length", "packing_num_proc",
    "packing_strategy", "padding_free", "padding_side", "sequence_parallel_size", "shuffle_buffer_size", "streaming",
    "template_backend", "tuner_backend", "use_logits_to_keep", "use_ray", "zero_hpz_partition_size",
)  # fmt: skip
FILES = (
    "add_version", "cached_val_dataset", "check_model", "ckpt_dir", "create_checkpoint_symlink", "data_seed",
    "download_mode", "global_world_size", "hub", "ignore_args_error", "load_from_cache_file", "local_repo_path",
    "local_world_size", "logging_dir", "max_shard_size", "model_info", "model_meta", "model_suffix", "rank",
    "safe_serialization", "swift_version", "training_args", "use_hf",
)  # fmt: skip
INFERENCE = (
    "add_non_thinking_prefix", "bnb_4bit_quant_storage", "eval_dataset", "eval_dataset_args", "eval_generation_config",
    "eval_limit", "eval_use_evalscope", "infer_backend", "logprobs", "max_new_tokens", "num_beams",
    "predict_with_generate", "repetition_penalty", "response_prefix", "stop_words", "stream",
    "structured_outputs_regex", "temperature", "top_k", "top_logprobs", "top_p",
)  # fmt: skip
MEDIA = (
    "aligner_lr",
    "freeze_aligner",
    "freeze_vit",
    "max_pixels",
    "norm_bbox",
    "vit_gradient_checkpointing",
    "vit_lr",
)
ALWAYS = ("is_training", "val_dataset_shuffle")
SHUFFLING = ("dataset_shuffle", "train_dataloader_shuffle")
# Options of methods that are refused where they are asked for; args.json holds all of them.
OTHER_METHODS = (
    "adalora_", "adapter_", "bnb_4bit_", "boft_", "fourier_", "galore_", "hqq_", "lisa_step", "llamapro_", "lora_ga_",
    "reft_", "swanlab_", "vera_", "vllm_",
)  # fmt: skip
METHOD_KEYS = ("tuner_type", "train_type", "sft_type")  # of version 4, 3 and 2


def convert(migration: Migration) -> None:
    """Move all keys of ms-swift."""
    is_text = migration.foreign.verb == "pt"
    _method(migration)
    migration.move(SAME)
    trainer.trainer(migration)
    batch = migration.value("training.batch_size") or 1
    if isinstance(batch, int):
        migration.default("training.accumulate", max(1, -(-TOTAL_BATCH // batch)))
    migration.default("training.learning_rate", FULL_RATE if migration.value("training.method") == "full" else RATE)
    for ours, value in DEFAULTS.items():
        migration.default(ours, value)
    _modules(migration)
    _data(migration)
    trainer.optimizer(migration)
    trainer.start(migration, "adapters")
    trainer.schedule(migration, "cosine", "lr_scheduler_type", "lr_scheduler_kwargs")
    _times(migration)
    _template(migration, is_text)
    _text(migration, is_text)
    migration.ignore("machine", MACHINE)
    migration.ignore("files", FILES)
    migration.ignore("inference", INFERENCE)
    migration.ignore("media", MEDIA)
    migration.ignore("always", [*ALWAYS, *(["strict"] if migration.left.get("strict") else [])])
    trainer.shuffling(migration, SHUFFLING)
    migration.ignore("inactive", [key for key in migration.left if key.startswith(OTHER_METHODS)])


def _method(migration: Migration) -> None:
    """What is trained, and on what. Refuses methods, stages and losses that are not ours."""
    for key in METHOD_KEYS:
        if (method := migration.take(key)) == "full":
            migration.put("training.method", "full", key)
        elif method not in (None, "lora"):
            migration.refuse("method", key, method)
    ms_swift_preference.method(migration)
    if (task := migration.take("task_type")) not in (None, "causal_lm"):
        migration.refuse("task", "task_type", task)
    migration.refuse_all("megatron", ["global_batch_size", "micro_batch_size"])
    trainer.quantized(migration, ["quant_bits", "quant_method"])
    migration.refuse_all("method", ["freeze_llm", "lisa_activated_layers"])
    migration.refuse_all("loss", ["enable_channel_loss", "enable_dft_loss", "loss_type"])
    if migration.left.get("optimizer") == "lorap":  # LoRA+, which lorap_lr_ratio switches on by itself
        migration.ignore("default", ["optimizer"])
    migration.refuse_all("optimizer", ["optimizer", "use_galore"])
    migration.refuse_all("dataset_kind", ["cached_dataset"])


def _modules(migration: Migration) -> None:
    """The modules to adapt, and how A begins."""
    names, expression = words(migration.take("target_modules", [])), migration.take("target_regex")
    if expression is not None:
        migration.put("lora.target_modules", expression, "target_regex")
    elif "all-linear" in names:
        migration.put("lora.target_modules", "all-linear", "target_modules")
        if len(names) > 1:
            others = [name for name in names if name != "all-linear"]
            trainer.beside_all_linear(migration, "target_modules", others)
    elif names:
        migration.put("lora.target_modules", names, "target_modules")
    start = migration.take("init_weights")
    if is_start(start):
        migration.put("lora.init_lora_weights", start, "init_weights")
    elif start in (True, "true"):
        migration.ignore("default", ["init_weights"])
    elif start is not None:
        migration.unmatch("none", "init_weights", start)


def _data(migration: Migration) -> None:
    """The base model and the datasets, which ms-swift takes from ModelScope unless `use_hf` or USE_HF is set."""
    hub = "" if migration.take("use_hf") or migration.foreign.is_on("USE_HF") else "modelscope:"
    base_model(migration, "model", hub)
    columns = migration.take("columns")
    columns = scalar(columns) if isinstance(columns, str) else columns
    columns = columns if isinstance(columns, dict) else {}
    renamed = {COLUMNS[str(ours)]: str(theirs) for theirs, ours in columns.items() if str(ours) in COLUMNS}
    if len(renamed) < len(columns):
        migration.unmatch("column", "columns", columns)
    train = Datasets(migration, "dataset")
    held_out = Datasets(migration, "val_dataset", train.columns)
    for datasets in (train, held_out):
        names = migration.take(datasets.key, [])
        for name in names if isinstance(names, list) else [names]:
            _dataset(datasets, str(name), hub, renamed)
    train.move()
    held_out.hold_out()
    _fill(migration)


def _dataset(datasets: Datasets, word: str, hub: str, renamed: Mapping[str, str]) -> None:
    """A dataset as `hub::name:subset#rows`, of which only the name must be there."""
    migration = datasets.migration
    if (path := migration.path(word)) is not None:
        datasets.add(str(path), renamed)
        return
    name, _sharp, rows = word.partition("#")
    prefix, colons, rest = name.partition("::")
    if colons:
        name, hub = rest, {"hf": "", "ms": "modelscope:"}.get(prefix.lower(), hub)
    if (path := migration.path(name)) is not None:
        datasets.add(str(path), renamed, rows or None)
        return
    name, _colon, subset = name.partition(":")
    if subset == "all" or "/" in subset:
        migration.unmatch("data_part", datasets.key, word)
        subset = ""
    place = local_or_hub(migration, name, hub if "/" in name else "")
    datasets.add(f"{place}:{subset}" if subset not in ("", "default") else place, renamed, rows or None)


def _fill(migration: Migration) -> None:
    """The placeholders {{NAME}} and {{AUTHOR}} of the dataset about the model's identity, in Chinese and English."""
    given = {key: words(migration.take(key, [])) for key in ("model_name", "model_author")}
    given = {key: names for key, names in given.items() if names}
    for key, names in given.items():
        if names[0] != names[-1]:
            migration.unmatch("languages", key, names[0])
    if given:
        named = {key.removeprefix("model_").upper(): names[-1] for key, names in given.items()}
        migration.put("data.fill", named, listed(given))


def _times(migration: Migration) -> None:
    """When to evaluate and save; evaluations follow the checkpoints if no key says when, and need held-out data."""
    strategy = migration.left.get("save_strategy", "steps")
    trainer.evaluation(migration, strategy if migration.value("data.held_out") else "no", "save_steps")
    trainer.saving(migration)
    trainer.patience(migration, "early_stop_interval")


def _template(migration: Migration, is_text: bool) -> None:
    """The chat template, which plain text does not have, and whether it asks for thinking."""
    if is_text:
        migration.ignore("inactive", ["template", "use_chat_template", "enable_thinking"])
        return
    if (name := migration.take("template")) is not None:
        note = _("lorasmith uses the chat template of the model itself")
        migration.put("data.template", "model", f"template: {name}", note)
    if (thinking := migration.take("enable_thinking")) is not None:
        migration.put("data.template_kwargs", {"enable_thinking": thinking}, "enable_thinking")
    if migration.take("use_chat_template", True) is True:
        migration.ignore("default", ["use_chat_template"])
    else:
        migration.unmatch("template", "use_chat_template", False)


def _text(migration: Migration, is_text: bool) -> None:
    """The system message, what is learned, and rows that are too long."""
    system = migration.take("system")
    if system is not None:
        file = migration.path(str(system)) if str(system).endswith(".txt") else None
        migration.put("data.system", read_text(file, ConfigError) if file else str(system), "system")
    if preference.is_on(migration) and migration.left.get("loss_scale") in ("default", "last_round"):
        migration.ignore("default", ["loss_scale"])
    elif preference.is_on(migration) and (scale := migration.take("loss_scale")):
        migration.unmatch("loss", "loss_scale", scale)
    else:
        _learn(migration, is_text)
    if (strategy := migration.take("truncation_strategy")) is not None:
        migration.put("data.too_long", TOO_LONG.get(str(strategy), strategy), "truncation_strategy")
    if migration.value("data.max_length") is None and "max_length" not in migration.given.get("data", {}):
        migration.unmatch("max_length", "max_length", _("not set"))
    if packing := migration.take("packing"):
        migration.unmatch("packing", "packing", packing)
    trainer.added_tokens(migration, "new_special_tokens")


def _learn(migration: Migration, is_text: bool) -> None:
    """What is learned of a conversation."""
    base, _plus, more = str(migration.take("loss_scale", "all" if is_text else "default")).partition("+")
    if base not in LEARN:
        base, more = "default", "+".join(part for part in (base, more) if part)
    if "loss_scale" in migration.known or is_text:
        migration.put("data.learn", LEARN[base], "loss_scale" if "loss_scale" in migration.known else "swift pt")
    if more:
        migration.unmatch("loss", "loss_scale", more)
