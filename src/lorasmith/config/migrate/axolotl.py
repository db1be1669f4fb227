"""Axolotl's configuration."""

from collections.abc import Mapping
from typing import Any

from lorasmith.config.migrate import axolotl_preference, trainer
from lorasmith.config.migrate.datasets import Datasets, base_model, first_rows, local_or_hub
from lorasmith.config.migrate.migration import OFF, Migration, shown, words
from lorasmith.i18n import _

NAME = "Axolotl"
SIGNATURE = frozenset({
    "adapter", "base_model", "datasets", "lora_target_linear", "micro_batch_size",
    "num_epochs", "sample_packing", "sequence_len", "val_set_size",
})  # fmt: skip
SAME = {
    "adam_beta1": "training.beta1",
    "adam_beta2": "training.beta2",
    "adam_eps": "training.eps",
    "adam_epsilon": "training.eps",
    "chat_template_kwargs": "data.template_kwargs",
    "default_system_message": "data.system",
    "gradient_accumulation_steps": "training.accumulate",
    "learning_rate": "training.learning_rate",
    "logging_steps": "training.log_every",
    "lora_alpha": "lora.lora_alpha",
    "lora_alpha_pattern": "lora.alpha_pattern",
    "lora_dropout": "lora.lora_dropout",
    "lora_modules_to_save": "lora.modules_to_save",
    "lora_r": "lora.r",
    "lora_rank_pattern": "lora.rank_pattern",
    "loraplus_lr_ratio": "training.loraplus_lr_ratio",
    "max_grad_norm": "training.clip",
    "micro_batch_size": "training.batch_size",
    "num_epochs": "training.epochs",
    "output_dir": "output",
    "peft_init_lora_weights": "lora.init_lora_weights",
    "peft_layers_to_transform": "lora.layers_to_transform",
    "peft_use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "save_total_limit": "training.keep_checkpoints",
    "seed": "training.seed",
    "sequence_len": "data.max_length",
    "use_tensorboard": "training.tensorboard",
    "val_set_size": "data.held_out",
    "weight_decay": "training.weight_decay",
}
DEFAULTS = {
    "data.held_out": 0.0,
    "data.max_length": 512,
    "data.too_long": "drop",
    "training.batch_size": 1,
    "training.epochs": 1.0,
    "training.keep_checkpoints": 4,
    "training.schedule": "cosine",
}
MACHINE = (
    "activation_offloading", "attn_implementation", "bf16", "bfloat16", "context_parallel_size", "cut_cross_entropy",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_keep_in_memory",
    "dataset_num_proc", "dataset_processes", "ddp", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_timeout",
    "deepspeed", "device_map", "dp_shard_size", "eager_attention", "embeddings_skip_upcast", "eval_batch_size",
    "eval_sample_packing", "experimental_skip_move_to_device", "expert_parallel_num_nvl_bytes", "expert_parallel_size",
    "expert_parallel_token_capacity", "experts_implementation", "flash_attention", "flash_attn_cross_entropy",
    "flash_attn_fuse_mlp", "flash_attn_rms_norm", "flash_optimum", "flex_attention", "float16", "fp16", "fsdp",
    "fsdp_config", "fsdp_version", "fused_attn_kernel", "gemma4_hybrid_attn_impl", "gptq", "gptq_disable_exllama",
    "gptq_groupsize", "gptq_model_v1", "gpu_memory_limit", "gradient_checkpointing_kwargs", "group_by_length",
    "liger_cross_entropy", "liger_fused_linear_cross_entropy", "liger_glu_activation", "liger_layer_norm",
    "liger_rms_norm", "liger_rms_norm_gated", "liger_rope", "load_in_16bit", "local_rank", "lora_fan_in_fan_out",
    "lora_mlp_kernel", "lora_o_kernel", "lora_on_cpu", "lora_qkv_kernel", "low_cpu_mem_usage",
    "max_packed_sequence_len", "model_quantization_config", "model_quantization_config_kwargs", "model_type",
    "multipack_real_batches", "pad_to_sequence_len", "ray_num_workers", "remove_unused_columns",
    "sample_packing_bin_size", "sample_packing_eff_est", "sample_packing_group_size", "sample_packing_sequentially",
    "sdp_attention", "tensor_parallel_size", "tf32", "tokenizer_legacy", "tokenizer_type", "tokenizer_use_fast",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_dtype", "unsloth_cross_entropy_loss",
    "unsloth_lora_mlp", "unsloth_lora_o", "unsloth_lora_qkv", "use_dsv4_kernels", "use_glm_dsa_kernels", "use_kernels",
    "use_ray", "use_scattermoe", "use_sonicmoe", "xformers_attention",
)  # fmt: skip
FILES = (
    "auto_resume_from_checkpoints", "dataset_prepared_path", "debug", "hf_use_auth_token", "hub_model_id",
    "hub_private_repo", "hub_strategy", "loss_watchdog_patience", "loss_watchdog_threshold", "mlflow_experiment_name",
    "push_dataset_to_hub", "save_only_model", "save_safetensors", "skip_prepare_dataset", "strict", "test_value",
    "wandb_entity", "wandb_log_model", "wandb_name", "wandb_run_id", "wandb_watch",
)  # fmt: skip
ALWAYS = ("load_best_model_at_end", "metric_for_best_model", "do_causal_lm_eval")
INFERENCE = (
    "do_bench_eval",
    "eval_causal_lm_metrics",
    "eval_max_new_tokens",
    "eval_table_size",
    "eval_table_max_new_tokens",
)
MEDIA = ("freeze_mm_modules", "image_size", "image_resize_algorithm", "processor_type")
QUANTIZED = (
    "load_in_4bit", "load_in_8bit", "qat", "quantize_moe_experts",
)  # fmt: skip
LOSSES = ("diffusion", "kd_trainer", "use_eaft")
METHODS = ("lisa_n_layers", "relora", "relora_steps", "unfrozen_parameters", "peft_layer_replication")
STAGES = ("process_reward_model", "reward_model")
TRACKERS = {
    "wandb": ("wandb_project", "use_wandb"),
    "mlflow": ("mlflow_tracking_uri", "use_mlflow"),
    "swanlab": ("swanlab_project", "use_swanlab"),
    "trackio": ("trackio_project_name", "use_trackio"),
    "comet": ("use_comet",),
}
FAST_PLUGINS = (
    ".CutCrossEntropyPlugin", ".KernelsPlugin", ".LigerPlugin",
)  # fmt: skip
CHAT, ALPACA, TEXT = ("chat_template", "sharegpt"), ("alpaca",), ("completion",)
# Keys of a dataset that need nothing from us.
DATASET_DONE = (
    "chat_template", "data_files", "ds_type", "field", "field_chosen", "field_messages", "field_rejected",
    "field_system", "field_tools",
    "message_field_content", "message_field_role", "message_property_mappings", "name", "path", "roles",
    "trust_remote_code", "type",
)  # fmt: skip
# Further keys of a dataset, with the values that mean what lorasmith does.
USUAL = {
    "field_thinking": {"reasoning", "reasoning_content", "thinking"},
    "roles_to_train": {"assistant", "gpt"},
    "split": {"train"},
    "template_thinking_key": {"reasoning", "reasoning_content", "thinking"},
    "train_on_eos": {"turn"},
}
ROLES = {
    "assistant": ("assistant", "gpt"),
    "system": ("system",),
    "tool": ("tool", "observation", "function_response"),
    "user": ("user", "human"),
}
LONGEST_PATH = 200  # characters; a longer text is a template itself
PROPERTIES = {"role": ("role", "from"), "content": ("content", "value")}


def convert(migration: Migration) -> None:
    """Move all keys of Axolotl."""
    _method(migration)
    migration.move(SAME)
    base_model(migration, "base_model")
    trainer.max_steps(migration)
    for ours, value in DEFAULTS.items():
        migration.default(ours, value)
    _lora(migration)
    trainer.optimizer(migration, "optimizer")
    trainer.start(migration, "lora_model_dir")
    trainer.schedule(migration, "cosine", "lr_scheduler", "lr_scheduler_kwargs", warmup=0.03)
    trainer.lowest_rate(migration, "cosine_min_lr_ratio", None, migration.take("cosine_min_lr_ratio"))
    _times(migration)
    _data(migration)
    _tokens(migration)
    if all(name.endswith(FAST_PLUGINS) for name in words(migration.left.get("plugins", []))):
        migration.ignore("machine", ["plugins"])
    migration.ignore("machine", MACHINE)
    migration.ignore("files", FILES)
    migration.ignore("always", ALWAYS)
    trainer.shuffling(migration, ["shuffle_merged_datasets"])
    migration.ignore("inference", INFERENCE)
    migration.ignore("media", MEDIA)


def _method(migration: Migration) -> None:
    """What is trained, and on what. Refuses methods and stages that are not ours."""
    if migration.left.get("adapter") == "qlora":
        trainer.quantized(migration, ["adapter"])
    elif (adapter := migration.take("adapter")) in (None, *OFF):
        migration.default("training.method", "full")
    elif adapter != "lora":
        migration.refuse("method", "adapter", adapter)
    axolotl_preference.method(migration)
    migration.refuse_all("stage", STAGES)
    trainer.quantized(migration, QUANTIZED)
    migration.refuse_all("method", METHODS)
    migration.refuse_all("loss", LOSSES)
    if migration.take("trust_remote_code"):
        migration.unmatch("remote_code", "trust_remote_code", True)
    if (checkpoint := migration.take("resume_from_checkpoint")) not in (None, False):
        migration.unmatch("resume", "resume_from_checkpoint", checkpoint)
    _trackers(migration)


def _trackers(migration: Migration) -> None:
    """The services that a training reports to: each has a key to switch it on, or is on if it has a project."""
    for name, keys in TRACKERS.items():
        given = {key: value for key in keys if (value := migration.take(key)) not in (None, *OFF)}
        for key, value in list(given.items())[:1]:
            trainer.trackers(migration, [name], key, value)
        for key, value in given.items():
            if isinstance(value, str) and trainer.tracker_mode(migration, name) not in trainer.DISABLED:
                migration.unmatch("tracker_project", key, value)
    migration.ignore("inactive", [key for key in ("swanlab_mode", "wandb_mode") if key in migration.left])


def _lora(migration: Migration) -> None:
    """The modules. Axolotl adds its list to all linear layers; a text is a regular expression."""
    targets, linear = migration.take("lora_target_modules"), migration.take("lora_target_linear")
    if linear:
        migration.put("lora.target_modules", "all-linear", "lora_target_linear")
        trainer.beside_all_linear(migration, "lora_target_modules", words(targets or []))
    elif targets is not None:
        migration.put("lora.target_modules", targets, "lora_target_modules")
    if (saving_memory := migration.take("gradient_checkpointing")) is not None:
        migration.put("training.gradient_checkpointing", bool(saving_memory), "gradient_checkpointing")


def _times(migration: Migration) -> None:
    """When to evaluate and save. Steps are counted by the Trainer; several times per epoch are not."""
    evaluations = migration.take("evals_per_epoch")
    if evaluations == 1:
        migration.ignore("default", ["eval_strategy"])
        migration.put("training.eval_every", "epoch", "evals_per_epoch")
    elif evaluations:
        migration.unmatch("per_epoch", "evals_per_epoch", evaluations, ours="training.eval_every")
    saves = migration.take("saves_per_epoch")
    if saves == 1:
        migration.put("training.save_every", "epoch", "saves_per_epoch")
    elif saves:
        migration.unmatch("per_epoch", "saves_per_epoch", saves, ours="training.save_every")
    is_by_steps = "eval_steps" in migration.left
    trainer.evaluation(migration, "steps" if is_by_steps else "no")
    if migration.left.keys() & {"save_steps", "save_strategy"}:
        trainer.saving(migration)
    trainer.patience(migration, "early_stopping_patience")


def _tokens(migration: Migration) -> None:
    """Special tokens: padding needs none here, and end tokens follow from the template."""
    tokens = migration.take_part("special_tokens")
    migration.ignore("stop", ["special_tokens.pad_token", "eot_tokens"])
    trainer.added_tokens(migration, "tokens", "special_tokens.additional_special_tokens")
    for name in tokens:
        if (value := migration.take(f"special_tokens.{name}")) is not None:
            migration.unmatch("special_token", f"special_tokens.{name}", value)


def _data(migration: Migration) -> None:
    """The datasets, and the template that their types need."""
    train = Datasets(migration, "datasets")
    held_out = Datasets(migration, "test_datasets", train.columns)
    templates: dict[str, str] = {}
    migration.refuse_all("dataset_kind", ["pretraining_dataset"])
    for datasets in (train, held_out):
        entries = migration.take(datasets.key, [])
        for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
            if isinstance(entry, dict) and isinstance(entry.get("path"), str):
                _dataset(datasets, f"{datasets.key}[{number}]", entry, templates)
            else:
                datasets.refuse("dataset_kind", entry)
    train.move()
    held_out.hold_out()
    _template(migration, templates)
    if migration.take("train_on_inputs"):
        migration.put("data.learn", "all", "train_on_inputs")
    if strategy := migration.take("excess_length_strategy"):
        ours = "error" if strategy == "raise" else strategy
        migration.put("data.too_long", ours, "excess_length_strategy")
    if packing := migration.take("sample_packing"):
        migration.unmatch("packing", "sample_packing", packing)


def _dataset(datasets: Datasets, where: str, entry: Mapping[str, Any], templates: dict[str, str]) -> None:
    """One dataset; `templates` gets the template that its type needs, with the place that needs it."""
    migration = datasets.migration
    kind, style = entry.get("type"), ""
    if isinstance(kind, str):
        kind, style = kind.replace(":", ".").partition(".")[::2]
    if (form := axolotl_preference.form(migration, entry, str(kind), style)) is not None:
        template, columns = form
        templates.setdefault(template, where)
        if columns is None:
            columns = _messages(migration, where, entry, "messages") | axolotl_preference.answers(entry)
    elif kind in TEXT:
        columns = {"text": str(entry.get("field") or style or "text")}
    elif kind in CHAT and style in ("", "default", "load_role"):
        templates.setdefault(str(entry.get("chat_template") or migration.left.get("chat_template") or ""), where)
        columns = _messages(migration, where, entry, "messages" if kind == "chat_template" else "conversations")
    elif kind in ALPACA and not style:
        templates.setdefault("alpaca", where)
        columns = {}
    else:
        datasets.refuse("prompt", f"{entry['path']}: {shown(entry.get('type'))}")
        return
    if entry["path"].startswith(("s3://", "gs://", "gcs://", "az://", "oci://", "http")):
        datasets.refuse("dataset_kind", entry["path"])
        return
    if datasets.lacks(f"{where}.split", entry.get("split")):
        return
    for name in _files(migration, where, entry):
        datasets.add(name, columns, first_rows(entry.get("split")), are_first=True)
    _tell_unknown(migration, where, entry)


def _files(migration: Migration, where: str, entry: Mapping[str, Any]) -> list[str]:
    """The names of a dataset for us: its files that are here, or its name on the hub with its configuration."""
    files = entry.get("data_files") or []
    found = [path for file in words(files) if (path := migration.path(file)) is not None]
    if found:
        return [str(path) for path in found]
    if files and migration.path(entry["path"]) is None:
        migration.unmatch("data_part", f"{where}.data_files", files)
    name = local_or_hub(migration, entry["path"])
    return [f"{name}:{entry['name']}" if isinstance(entry.get("name"), str) else name]


def _messages(migration: Migration, where: str, entry: Mapping[str, Any], usual: str) -> dict[str, str]:
    """The column of the messages, and their keys and roles, of which we know the usual ones."""
    properties = entry.get("message_property_mappings")
    properties = {str(ours): theirs for ours, theirs in properties.items()} if isinstance(properties, dict) else {}
    for ours in ("role", "content"):
        if key := entry.get(f"message_field_{ours}"):
            properties.setdefault(ours, key)
    for ours, theirs in properties.items():
        if theirs not in PROPERTIES.get(ours, (ours,)):
            migration.unmatch("roles", f"{where}.message_property_mappings.{ours}", theirs)
    roles = entry.get("roles")
    for ours, theirs in (roles if isinstance(roles, dict) else {}).items():
        if unknown := [name for name in words(theirs) if name not in ROLES.get(ours, ())]:
            migration.unmatch("roles", f"{where}.roles.{ours}", unknown)
    column = str(entry.get("field_messages") or usual)
    columns = {column if column in ("messages", "conversations") else "conversations": column}
    for ours in ("system", "tools"):
        if theirs := entry.get(f"field_{ours}"):
            columns[ours] = str(theirs)
    return columns


def _tell_unknown(migration: Migration, where: str, entry: Mapping[str, Any]) -> None:
    """Report what a dataset asks for and we do not do."""
    for key, value in entry.items():
        if value in OFF or value is None or key in DATASET_DONE:
            continue
        if (key in USUAL and set(words(value)) <= USUAL[key]) or (key == "split" and first_rows(value)):
            continue
        reason = "data_part" if key in ("split", "shards", "shards_idx") else "none"
        migration.unmatch(reason, f"{where}.{key}", value)


def _template(migration: Migration, templates: Mapping[str, str]) -> None:
    """The template of all datasets: the model's own instead of Axolotl's copy of it."""
    migration.take("chat_template")
    text = migration.take("chat_template_jinja")
    if len(templates) > 1:
        first, second = list(templates)[:2]
        key = templates[second]
        migration.refuse("templates", key, second, unless="data.template", first=first or "model", second=second)
    name = next(iter(templates), "alpaca")
    if name == "alpaca":
        migration.ignore("inactive", ["chat_template", "chat_template_jinja"])
        if templates:
            migration.put("data.template", "alpaca", "datasets")
    elif name == "chatml":
        migration.put("data.template", "chatml", "chat_template")
    elif text is not None and name in ("jinja", ""):
        file = migration.path(text) if isinstance(text, str) and len(text) < LONGEST_PATH else None
        if file is None:
            migration.unmatch("template", "chat_template_jinja", text)
        else:
            migration.put("data.template", str(file), "chat_template_jinja")
    else:
        note = _("lorasmith uses the chat template of the model itself")
        migration.put("data.template", "model", f"chat_template: {name}" if name else "datasets", note)
