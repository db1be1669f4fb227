"""The part of a PeftModel that adds LoRA to its base model and switches, merges and removes adapters.

PEFT's code does what lies around the LoRA layers: modules_to_save, trainable tokens, files, and the PeftModel itself.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

from accelerate import init_empty_weights
from peft import LoraModel as PeftsLoraModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype, check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from peft.utils.other import _set_adapter as set_auxiliary_adapter
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig as CoreConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _, listed
from lorasmith.lora.adapted import LAYERS, cast_to_base, layers_of, parameters_of, set_trained
from lorasmith.lora.files import mismatches
from lorasmith.lora.inject import PEFT_PREFIX, inject, remove
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.merge import merge_more, restore_weights
from lorasmith.lora.one_by_one import OneByOne
from lorasmith.lora.peft_order import in_order, present
from lorasmith.lora.quantized import is_quantized
from lorasmith.lora.router import Router
from lorasmith.lora.rows import RowRouting
from lorasmith.lora.update import Update
from lorasmith.lora.variant import variant_of
from lorasmith.peft.config import Kind, LoraConfig, core_config, own_config
from lorasmith.peft.layers import tell
from lorasmith.peft.refused import unsupported
from lorasmith.peft.rows import route_rows
from lorasmith.peft.weighted import add_weighted


class LoraModel(PeftsLoraModel):
    """PEFT's LoraModel, whose layers and numbers are lorasmith's. `PeftModel.base_model` is one.

    With the same torch.manual_seed, A starts at the numbers that PEFT draws.
    """

    tuner_layer_cls: Any = LoRALayer
    router: Router
    peft_config: dict[str, Any]

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.router, self.disabled = Router(), False
        self.rows, self.one_by_one = RowRouting(model, self.router), OneByOne()
        self.merged_names: list[str] = []
        self.saved_weights: dict[str, Tensor] = {}  # of the merged layers, as they were before

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Add the adapter of `self.peft_config[adapter_name]`. See lorasmith.lora.inject.inject for the errors."""
        if state_dict is not None:
            raise unsupported("inject_adapter_in_model(state_dict=...)")
        config = self.peft_config[adapter_name] = own_config(self.peft_config[adapter_name])
        model_config = self.get_model_config(model)
        self._check_new_adapter_config(config)
        self._check_tied_modules(model, config)
        core = self._resolve(cast(PreTrainedModel, model), self._prepare_adapter_config(config, model_config))  # type: ignore[no-untyped-call]
        before = {id(p): p.requires_grad for p in model.parameters()} if any(layers_of(model)) else {}
        # a variant's own start is computed from the weights
        empty = low_cpu_mem_usage and variant_of(core) is Update
        with init_empty_weights() if empty else nullcontext():
            inject(cast(PreTrainedModel, model), core, self.router, adapter_name, seed=None,
                   strict=not config.from_file, any_rank=True)  # fmt: skip
        trained = adapter_name in self.active_adapters and not config.inference_mode
        self._train_only({adapter_name: trained})
        set_additional_trainable_modules(model=model, peft_config=config, model_config=model_config,
            adapter_name=adapter_name, activate_adapter=adapter_name in self.active_adapters)  # fmt: skip
        for p in model.parameters():
            p.requires_grad_(before.get(id(p), p.requires_grad))
        self._tell_layers()

    def _resolve(self, model: PreTrainedModel, config: LoraConfig) -> CoreConfig:
        """The LoRA options, with the full paths of the target modules in the model's order, as PEFT adds them."""
        auxiliary = [path for path, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        wanted = core_config(config).model_copy(update={"modules_to_save": present(model, config.modules_to_save)})
        core, targets = in_order(model, wanted, not config.from_file, auxiliary)
        self.targeted_module_names += [p for p in core.target_modules if p not in self.targeted_module_names]
        self.targeted_parameter_names += [p for p in targets.parameters if p not in self.targeted_parameter_names]
        if wanted.target_modules == "all-linear":
            config.target_modules = cast(Any, set(core.target_modules))
        return core.model_copy(update={"modules_to_save": ()})

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        raise ConfigError(_("LoraConfig: ensure_weight_tying with an embedding in target_modules is not supported. "
                            "Train the embedding with modules_to_save or trainable_token_indices."))  # fmt: skip

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep A and B in float32, or in the base model's dtype if they are not to be cast."""
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            cast_to_base(self.model, adapter_name)

    def _tell_layers(self, others: Iterable[tuple[str, Any]] = ()) -> None:
        """Route to the active adapters, and let the layers, and `others`, say what PEFT's functions ask them."""
        self.router.activate([] if self.disabled or self.merged_names else self.active_adapters)
        for path, layer in (*layers_of(self.model), *others):
            tell(path, layer, self)

    def _train_only(self, names: Mapping[str, bool]) -> None:
        """Train, or do not train, the LoRA parameters of these adapters."""
        for name, trained in names.items():
            is_mica = name in self.peft_config and self.peft_config[name].init_lora_weights == "mica"
            set_trained(self.model, name, trained, is_mica)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False, around: bool = True) -> None:
        """Make these adapters the active ones, whose updates add up, and the only ones that are trained."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._require(names)
        if self.merged_names:
            warnings.warn(
                _("The merged adapters {names} are unmerged first.", names=listed(self.merged_names)), stacklevel=2
            )
            self.unmerge_adapter()
        if around:  # also in modules_to_save and trained tokens
            set_auxiliary_adapter(self.model, adapter_name, inference_mode=inference_mode)
        self._train_only({name: name in names and not inference_mode for name in self.peft_config})
        self.active_adapter = adapter_name
        self.one_by_one = OneByOne()
        self._tell_layers()

    def set_in_layer(self, path: str, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """set_adapter of the layer at `path`, which takes effect once it has been called for all layers."""
        if self.one_by_one.ask(path, adapter_names, inference_mode, dict(layers_of(self.model))):
            self.set_adapter(adapter_names, inference_mode, around=False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters, or do not."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._train_only(dict.fromkeys(names, requires_grad))
        for module in self._around():
            module.set_requires_grad(adapter_names=adapter_names, requires_grad=requires_grad)

    def _around(self) -> list[Any]:
        """PEFT's own modules in the model."""
        kinds = (AuxiliaryTrainingWrapper, BaseTunerLayer)
        return [m for m in self.model.modules() if isinstance(m, kinds) and not isinstance(m, LAYERS)]

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        if self.merged_names and not enabled:
            self.unmerge_adapter()
        for module in self._around():
            module.enable_adapters(enabled)
        self.disabled = not enabled
        self._train_only({name: enabled and name in self.active_adapters for name in self.peft_config})
        self._tell_layers()

    def _require(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(_("Adapter {name} not found.", name=unknown[0]))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove this adapter; if it was active, the first of the others becomes active."""
        self._require([adapter_name])
        if adapter_name in self.merged_names:
            raise ValueError(_("The adapter {name} is merged. Call unmerge_adapter first.", name=adapter_name))
        del self.peft_config[adapter_name]
        layers = list(layers_of(self.model, adapter_name))
        remove(cast(PreTrainedModel, self.model), adapter_name)
        kept = [name for name in self.active_adapters if name != adapter_name] or list(self.peft_config)[:1]
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(adapter_name, new_active_adapters=kept or None)
        self.active_adapter = kept
        self._tell_layers(layers)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """The context of a forward pass: each row with its adapter, and an aLoRA from its invocation sequence on."""
        self.one_by_one.check()
        if kwargs.get("adapter_names") is None and self.router.active not in self.router.partial:
            return nullcontext()
        return route_rows(self, kwargs.get("adapter_names"), kwargs.get("alora_offsets"))

    def add_weighted_adapter(  # type: ignore[override]  # its options for the SVD are refused or of no effect
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "svd",
        svd_rank: int | None = None, density: float | None = None, majority_sign_method: str = "total", **svd: Any,
    ) -> None:  # fmt: skip
        """Add a frozen adapter that is a weighted sum of others. See `add_weighted`."""
        if adapter_name in self.peft_config:
            raise ValueError(_("An adapter {name} exists already.", name=adapter_name))
        if given := [key for key, value in svd.items() if not (key == "svd_full_matrices" or value is None)]:
            raise unsupported(f"add_weighted_adapter({given[0]}=...)")
        add_weighted(self, adapters, weights, adapter_name, combination_type, svd_rank, density, majority_sign_method)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the adapters to the weights of the base model, of which a copy is kept for `unmerge_adapter`."""
        self._check_merge_allowed()  # type: ignore[no-untyped-call]
        names = self._to_merge(adapter_names)
        self._merge(names, safe_merge, keep=True)
        self.merged_names += names
        for module in self._around():
            if isinstance(module, BaseTunerLayer):
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._tell_layers()

    def _to_merge(self, names: list[str] | None) -> list[str]:
        merged = self.merged_names
        state: Any = SimpleNamespace(active_adapters=self.active_adapters, merged=bool(merged), merged_adapters=merged)
        chosen = check_adapters_to_merge(state, names)
        self._require(chosen)
        return chosen

    def _merge(self, names: Sequence[str], safe: bool, keep: bool) -> None:
        if any(is_quantized(layer.base_layer) for name in names for _path, layer in layers_of(self.model, name)):
            raise unsupported("merging into a quantized base model")
        # first without a change: no bias may be there for that of lora_bias, and an aLoRA belongs to no weights
        configs = [self.peft_config[name] for name in (*self.merged_names, *names)]
        check = safe or any(config.lora_bias or config.alora_invocation_tokens for config in configs)
        self.saved_weights = merge_more(self.model, self.saved_weights, self.merged_names, names, keep, check)

    def unmerge_adapter(self) -> None:
        """Give the base model its own weights again, bit for bit."""
        restore_weights(self.model, self.saved_weights)
        for module in self._around():
            if isinstance(module, BaseTunerLayer):
                module.unmerge()
        self.merged_names = []
        self._tell_layers()

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # fmt: skip
        if merge:
            self._merge(self._to_merge(adapter_names), safe_merge, keep=False)
        for name in list(self.peft_config):
            remove(cast(PreTrainedModel, self.model), name)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor], unwanted_adapter_names: Any
    ) -> dict[str, Tensor]:
        """The tensors of the adapter, by their names in the model."""
        given = model, config, adapter_name, state_dict, unwanted_adapter_names
        found: dict[str, Tensor] = super()._get_adapter_state_dict(*given)  # type: ignore[no-untyped-call]
        return found | {key: state_dict[key] for key, *_rest in parameters_of(model, adapter_name) if key in state_dict}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors by their names in the model. Raises AdapterError that lists missing and unknown ones."""
        there, wanted = model.state_dict(), {key: p for key, p, _dtype in parameters_of(model, adapter_name)}
        names = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in wanted}
        named = {names.get(key, names.get(key.removeprefix(PEFT_PREFIX), key)): t for key, t in state_dict.items()}
        found = super(PeftsLoraModel, cls)._remap_adapter_state_dict_for_load(model, config, adapter_name, named)
        tensors = {key: tensor for key, tensor in found.items() if key in wanted or key not in there}
        if problems := mismatches(wanted, {key: wanted.get(key, tensor) for key, tensor in tensors.items()}):
            raise AdapterError(*problems)
        return found


cast(dict[Any, Any], PEFT_TYPE_TO_TUNER_MAPPING)[Kind.LORA] = LoraModel
