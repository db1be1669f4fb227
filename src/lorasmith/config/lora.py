"""Options of LoRA, named as in the paper and in PEFT. Loads no torch."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorasmith.config.values import COLLECT_PROBLEMS, Typed, did_you_mean, validation_messages
from lorasmith.errors import ConfigError
from lorasmith.i18n import _, listed

MAX_RANK = 1_000_000  # wider than the layers of any model; `inject` checks against those of the base model
MAX_ALPHA = 1_000_000
STARTS = (
    "default",
    "gaussian",
    "orthogonal",
    "pissa",
    "olora",
    "mica",
    "eva",
    "loftq",
    "random",
)  # of init_lora_weights
OTHER_STARTS = ("corda", "lora_ga")  # those of PEFT that change the base model and need a step of their own
_SIGNS = re.compile(r"[*+?^$()\[\]{}|\\]")  # occur in regular expressions but not in module names


def is_name(pattern: str) -> bool:
    """Whether `pattern` is a module name, matched at the end of a path, rather than a regular expression."""
    return not _SIGNS.search(pattern)


def is_start(value: object) -> bool:
    """Whether `value` is the name of an initialization."""
    return value in STARTS or (isinstance(value, str) and bool(re.fullmatch(r"pissa_niter_[1-9]\d?", value)))


class LoraConfig(Typed):
    """The [lora] section: options of y = W0 x + (lora_alpha / r) B A x (arXiv:2106.09685, section 4.1).

    Raises ConfigError with one line per invalid option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: Annotated[int, Field(gt=0, le=MAX_RANK, description=_("LoRA rank: the inner dimension of A and B"))] = 8
    lora_alpha: Annotated[
        float,
        Field(
            gt=0,
            le=MAX_ALPHA,
            allow_inf_nan=False,
            description=_("LoRA alpha: the update is scaled by lora_alpha / r; twice r is a common choice"),
        ),
    ] = 16.0
    lora_dropout: Annotated[
        float, Field(ge=0, lt=1, allow_inf_nan=False, description=_("Dropout probability on the input of A"))
    ] = 0.0
    target_modules: Annotated[
        str | tuple[str, ...],
        Field(
            description=_(
                "Modules to adapt: all-linear, one or several module names, or a regular expression that "
                "matches the whole module path"
            )
        ),
    ] = "all-linear"
    target_parameters: Annotated[
        tuple[str, ...] | None,
        Field(
            description=_(
                "Names of weights to adapt that are not linear layers, such as experts.gate_up_proj; with all-linear, "
                "all experts if not given"
            )
        ),
    ] = None
    exclude_modules: Annotated[
        str | tuple[str, ...] | None,
        Field(description=_("Modules to exclude, written like target_modules")),
    ] = None
    layers_to_transform: Annotated[
        tuple[int, ...] | None,
        Field(description=_("Indices of the layers to adapt, counted from 0; all layers if not given")),
    ] = None
    last_layers: Annotated[
        int | None,
        Field(gt=0, le=MAX_RANK, description=_("Adapt only the last N decoder layers; all layers if not given")),
    ] = None
    rank_pattern: Annotated[
        dict[str, int],
        Field(description=_("Different r for modules whose path ends with the given name or expression")),
    ] = {}  # noqa: RUF012  pydantic copies it
    alpha_pattern: Annotated[
        dict[str, float],
        Field(description=_("Different lora_alpha for modules whose path ends with the given name or expression")),
    ] = {}  # noqa: RUF012  pydantic copies it
    modules_to_save: Annotated[
        tuple[str, ...], Field(description=_("Modules to train in full, as a copy that is saved with the adapter"))
    ] = ()
    bias: Annotated[
        Literal["none", "all", "lora_only"], Field(description=_("Which biases of the base model to train too"))
    ] = "none"
    use_rslora: Annotated[
        bool,
        Field(
            description=_(
                "Use rank-stabilized LoRA (arXiv:2312.03732): scale by lora_alpha / sqrt(r) instead of lora_alpha / r"
            )
        ),
    ] = False
    use_dora: Annotated[
        bool,
        Field(
            description=_(
                "Use DoRA (arXiv:2402.09353): train the magnitude of each weight row separately from its direction"
            )
        ),
    ] = False
    lora_bias: Annotated[
        bool, Field(description=_("Give B a trained bias of its own; PEFT and lorasmith can load it, vLLM cannot"))
    ] = False
    alora_invocation_tokens: Annotated[
        tuple[int, ...] | None,
        Field(
            min_length=1,
            description=_(
                "aLoRA (arXiv:2504.12397): token ids from whose last occurrence in a text on the adapter is active; "
                "before it, the base model's keys and values are used"
            ),
        ),
    ] = None
    init_lora_weights: Annotated[
        str,
        Field(
            description=_(
                "Initialization of A and B. B starts at zero with default (A Kaiming uniform), gaussian (A from "
                "N(0, 1/r)) and eva (arXiv:2410.07170: A from the inputs of the first training examples). orthogonal, "
                "pissa (arXiv:2404.02948), pissa_niter_N (its fast approximation), olora (arXiv:2406.01775), mica "
                "(arXiv:2604.01694, B frozen) and, with model.quantize, loftq (arXiv:2310.08659: from the error of "
                "quantizing) start both otherwise"
            )
        ),
    ] = "default"

    @field_validator("target_modules", "target_parameters", "modules_to_save", "exclude_modules")
    @classmethod
    def _not_empty(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if value is not None and value and any(not name for name in ([value] if isinstance(value, str) else value)):
            raise ValueError(_("a name is empty"))
        return value

    @field_validator("target_modules", "target_parameters", "exclude_modules")
    @classmethod
    def _names(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        # PEFT treats the items of a list as names, so a regular expression in one would match nothing there.
        for item in () if isinstance(value, str) else value or ():
            if not is_name(item):
                raise ValueError(
                    _(
                        "{item!r} is not a module name, and a list may only contain names; give a regular "
                        "expression as a single value, such as '.*(q_proj|v_proj)'",
                        item=item,
                    )
                )
        return value

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _start(cls, value: Any) -> Any:
        """PEFT's True is the default here, and its False, with which B is random too, is 'random'."""
        if isinstance(value, bool) or value in ("true", "false"):
            return "default" if value in (True, "true") else "random"
        if not isinstance(value, str) or is_start(value):
            return value
        if value in OTHER_STARTS:
            raise ValueError(_("lorasmith does not have {name!r}; use 'pissa', 'eva' or 'default'", name=value))
        known = listed([*STARTS, "pissa_niter_N"])
        raise ValueError(
            _("unknown initialization {name!r}: choose from {known}", name=value, known=known)
            + did_you_mean(value, STARTS)
        )

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        expressions = [("rank_pattern", k) for k in self.rank_pattern] + [
            ("alpha_pattern", k) for k in self.alpha_pattern
        ]
        expressions += [
            (key, v)
            for key, v in (("target_modules", self.target_modules), ("exclude_modules", self.exclude_modules))
            if isinstance(v, str)
        ]
        for key, expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(
                    _(
                        "{key}: {expression!r} is not a valid regular expression: {error}",
                        key=key,
                        expression=expression,
                        error=error,
                    )
                ) from None
        ranks, alphas = self.rank_pattern.values(), self.alpha_pattern.values()
        if not all(0 < r <= MAX_RANK for r in ranks) or not all(0 < alpha <= MAX_ALPHA for alpha in alphas):
            most = max(MAX_RANK, MAX_ALPHA)
            raise ValueError(
                _("the values of rank_pattern and alpha_pattern must be greater than 0, up to {most}", most=most)
            )
        if self.last_layers is not None and self.layers_to_transform is not None:
            raise ValueError(_("last_layers and layers_to_transform both select layers; give only one of them"))
        if self.alora_invocation_tokens is not None and (self.modules_to_save or self.bias != "none"):
            raise ValueError(
                _(
                    "alora_invocation_tokens: modules_to_save and bias change tokens before the invocation sequence "
                    "too, so an aLoRA cannot have them; remove them"
                )
            )
        if not self.target_modules and not self.target_parameters:  # PEFT needs either besides modules_to_save
            raise ValueError(_("no module would be adapted: name modules in target_modules, or use all-linear"))
        return self

    @model_validator(mode="wrap")  # defined last, so that it sees the errors of the others
    @classmethod
    def _in_our_words(cls, values: Any, check: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Make `LoraConfig(r=0)` raise ConfigError; as part of a whole configuration, let that collect all problems."""
        if info.context == COLLECT_PROBLEMS:
            return check(values)
        try:
            return check(values)
        except ValidationError as error:
            raise ConfigError(*validation_messages(error, cls)) from None

    def scaling(self, r: int, alpha: float) -> float:
        """The factor of B A x: alpha / r, or alpha / sqrt(r) with use_rslora (arXiv:2312.03732, section 3)."""
        return float(alpha / r**0.5) if self.use_rslora else alpha / r
