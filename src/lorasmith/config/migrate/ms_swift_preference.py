"""What ms-swift says of training on preferences: `swift rlhf`, or a file with `rlhf_type`."""

from lorasmith.config.migrate import preference
from lorasmith.config.migrate.migration import Migration
from lorasmith.config.preference import METHODS

OPTIONS = {
    "beta": "beta",
    "cpo_alpha": "rpo_alpha",
    "desirable_weight": "desirable_weight",
    "label_smoothing": "label_smoothing",
    "rpo_alpha": "rpo_alpha",
    "simpo_gamma": "gamma",
    "undesirable_weight": "undesirable_weight",
}
NOT_OF = {"cpo_alpha": "dpo", "rpo_alpha": "simpo"}  # a method that does not use the key
DEFAULTS = {"beta": 0.1}
SIMPO_DEFAULTS = {"beta": 2.0, "gamma": 1.0, "rpo_alpha": 1.0}
# Beginnings of keys of reinforcement learning and of other losses, which args.json has beside those of the method.
OTHERS = (
    "advantage_", "async_generate", "center_rewards_coefficient", "chord_", "cliprange", "completion_length_limit",
    "cosine_max_", "cosine_min_", "delta", "discopop_tau", "dynamic_sample", "enable_flattened", "epsilon", "fipo_",
    "gamma", "generation_batch_size", "gkd_", "gym_env", "importance_sampling_level", "kl_coef", "kl_in_reward", "lam",
    "lmbda", "local_rollout", "log_completions", "log_entropy", "log_rollout", "max_completion_length", "max_resample",
    "max_turns", "min_p", "missing_eos_penalty", "move_model_batches", "multi_turn_scheduler", "num_generations",
    "num_iterations", "num_mini_batches", "num_ppo_epochs", "num_sample_generations", "off_policy", "offload_model",
    "offload_optimizer", "offload_teacher", "overlong_filter", "real_tau", "ref_model_mixup", "ref_model_revision",
    "ref_model_sync", "ref_model_type", "repetition_max_penalty", "repetition_n_grams", "response_length", "reward_",
    "rlsd_", "rollout_", "scale_rewards", "sdar_", "seq_kd", "sft_alpha", "sleep_level", "soft_cache", "soft_max",
    "steps_per_generation", "sync_ref_model", "tau_", "teacher_", "top_entropy", "use_gym_env", "use_vllm", "vf_coef",
    "vllm_", "wandb_log_unique_prompts", "whiten_rewards",
)  # fmt: skip


def method(migration: Migration) -> None:
    """The method, the options of its loss and its reference; nothing if the file is not about preferences."""
    key = "rlhf_type" if "rlhf_type" in migration.left else "swift"
    name = migration.take("rlhf_type", "dpo" if migration.foreign.verb == "rlhf" else None)
    if name is None:
        return
    if name == "cpo" and migration.left.get("loss_type") in ("simpo", ["simpo"]):
        name = "simpo"  # as ms-swift writes it into args.json
    if name not in METHODS:
        migration.refuse("loss" if name == "cpo" else "stage", key, name)
        return
    preference.choose(migration, name, key)
    migration.refuse_all("loss", ["ld_alpha"])
    preference.trl_losses(migration, "loss_type", "loss_weights")
    table = {key: ours for key, ours in OPTIONS.items() if NOT_OF.get(key) != name}
    preference.options(migration, table, SIMPO_DEFAULTS if name == "simpo" else DEFAULTS)
    preference.reference(migration, "ref_model", "ref_adapters", "model", "adapters")
    migration.ignore("inactive", [key for key in migration.left if key in OPTIONS or key.startswith(OTHERS)])
