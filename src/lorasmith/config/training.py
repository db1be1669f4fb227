"""Options of training: batch, schedule, optimizer, evaluation and checkpoints. Loads no torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, field_validator, model_validator

from lorasmith.config.values import Typed, did_you_mean
from lorasmith.i18n import _, listed

MAX_STEPS = 999_999  # the name of a checkpoint has six digits
MAX_EXAMPLES, MAX_TOKENS = 1_000_000, 10_000_000
MAX_NUMBER = 1e30  # AdamW computes with these in float32
TRACKERS = ("tensorboard", "wandb", "swanlab", "mlflow", "trackio")
# Options that an optimizer does not have. With Muon, the AdamW of the few parameters that are no matrices has the
# default ones.
UNUSED_BY = {"adafactor": ("beta1", "beta2", "eps"), "lion": ("eps",), "muon": ("beta1", "beta2", "eps")}
USUAL_RATE = 2e-4  # the default learning rate with method "lora", and for a base model of fewer parameters:
SMALL_MODEL, SMALL_MODEL_RATE = 500_000_000, 1e-3
RATE_DIVISORS = {"full": 10, "orpo": 10, "dpo": 40, "kto": 40, "simpo": 40}  # of that rate, for the other methods
Every = Annotated[int, Field(ge=0, le=MAX_STEPS)] | Literal["epoch"]  # 0: never; 'epoch': once per epoch


def usual_rate(parameters: int, method: str = "lora") -> float:
    """The default learning rate for a base model of so many parameters; docs/quality.md has the figures."""
    rate = SMALL_MODEL_RATE if parameters < SMALL_MODEL else USUAL_RATE
    return rate / RATE_DIVISORS.get(method, 1)


class TrainingConfig(Typed):
    """The [training] section. docs/decisions.md has the source of each default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Annotated[
        Literal["lora", "full", "dpo", "orpo", "kto", "simpo"],
        Field(
            description=_(
                "What is trained: lora (an adapter), full (all weights of the base model), or an adapter on preference "
                "pairs: dpo, orpo, kto, simpo"
            )
        ),
    ] = "lora"
    start_from: Annotated[
        str | None,
        Field(description=_("Run or adapter folder to continue training from, with a new optimizer and schedule")),
    ] = None
    batch_size: Annotated[int, Field(gt=0, le=MAX_EXAMPLES, description=_("Examples per micro-batch"))] = 8
    accumulate: Annotated[
        int,
        Field(
            gt=0,
            le=MAX_EXAMPLES,
            description=_("Micro-batches per optimizer step; each step uses batch_size x accumulate examples"),
        ),
    ] = 1
    epochs: Annotated[
        float,
        Field(
            gt=0,
            le=MAX_STEPS,
            allow_inf_nan=False,
            description=_("Number of epochs; ignored if max_steps is set"),
        ),
    ] = 1.0
    max_steps: Annotated[int | None, Field(gt=0, le=MAX_STEPS, description=_("Stop after this many steps"))] = None
    learning_rate: Annotated[
        Annotated[float, Field(gt=0, le=MAX_NUMBER, allow_inf_nan=False)] | Literal["auto"],
        Field(
            description=_(
                "Peak learning rate; auto lets five rates race over the first steps, and trains with the best by "
                "held-out loss. By default 1e-3 for a base model of fewer than 500 million parameters, else 2e-4; a "
                "tenth of it if method is full or orpo, and a fortieth if it is dpo, kto or simpo"
            )
        ),
    ] = USUAL_RATE
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Field(description=_("Learning rate schedule after warmup"))
    ] = "linear"
    min_learning_rate: Annotated[
        float,
        Field(
            ge=0,
            le=MAX_NUMBER,
            allow_inf_nan=False,
            description=_("Learning rate at the end of a linear or cosine schedule"),
        ),
    ] = 0.0
    warmup: Annotated[
        float,
        Field(
            ge=0,
            le=MAX_STEPS,
            allow_inf_nan=False,
            description=_("Number of warmup steps; a value below 1 is a fraction of all steps"),
        ),
    ] = 0.03
    optimizer: Annotated[
        Literal["adamw", "adamw8bit", "adafactor", "lion", "muon"],
        Field(
            description=_(
                "Optimizer; lion needs about a tenth of the learning rate of the others, and adamw8bit lorasmith[quant]"
            )
        ),
    ] = "adamw"
    beta1: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, description=_("beta1 of AdamW and Lion"))] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, description=_("beta2 of AdamW and Lion"))] = 0.999
    eps: Annotated[float, Field(gt=0, le=MAX_NUMBER, allow_inf_nan=False, description=_("AdamW epsilon"))] = 1e-8
    loraplus_lr_ratio: Annotated[
        float,
        Field(
            ge=1,
            le=MAX_NUMBER,
            allow_inf_nan=False,
            description=_(
                "LoRA+ (arXiv:2402.12354): learning rate of B as a multiple of learning_rate, which is then that of A; "
                "1 is plain LoRA, and 16 what the paper suggests"
            ),
        ),
    ] = 1.0
    weight_decay: Annotated[
        float, Field(ge=0, le=MAX_NUMBER, allow_inf_nan=False, description=_("Decoupled weight decay"))
    ] = 0.0
    clip: Annotated[
        float,
        Field(ge=0, le=MAX_NUMBER, allow_inf_nan=False, description=_("Maximum gradient norm; 0 disables clipping")),
    ] = 1.0
    gradient_checkpointing: Annotated[
        bool, Field(description=_("Recompute activations in the backward pass; saves memory but is slower"))
    ] = False
    row_tokens: Annotated[
        int,
        Field(
            gt=0,
            le=MAX_TOKENS,
            description=_("Maximum number of tokens per forward pass; lower values need less memory"),
        ),
    ] = 2048
    log_every: Annotated[
        int, Field(gt=0, le=MAX_STEPS, description=_("Write a line to metrics.jsonl every N steps"))
    ] = 1
    eval_every: Annotated[
        Every,
        Field(
            description=_(
                "Evaluate on the held-out examples every N steps, or once per epoch with 'epoch'; 0 evaluates only "
                "before and after training"
            )
        ),
    ] = 0
    patience: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_STEPS,
            description=_("Stop after this many evaluations without a better held-out loss; 0 disables early stopping"),
        ),
    ] = 0
    samples: Annotated[
        tuple[str, ...], Field(description=_("Prompts to answer at every evaluation; the answers go to samples.jsonl"))
    ] = ()
    generate: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_EXAMPLES,
            description=_("Number of held-out examples to answer at every evaluation, scored as in lorasmith eval"),
        ),
    ] = 0
    max_new_tokens: Annotated[
        int, Field(gt=0, le=MAX_TOKENS, description=_("Maximum length of these answers in tokens"))
    ] = 256
    metric: Annotated[
        tuple[str, ...],
        Field(description=_("Custom metrics for these answers, each FILE.py:FUNCTION as in lorasmith eval")),
    ] = ()
    report_to: Annotated[
        tuple[str, ...],
        Field(
            description=_(
                "Also send the metrics to these trackers: tensorboard, wandb, swanlab, mlflow, trackio; each requires "
                "the extra of its name, such as lorasmith[wandb]"
            )
        ),
    ] = ()
    tensorboard: Annotated[
        bool,
        Field(
            description=_(
                "Also write the metrics as event files to RUN/tensorboard, like --report-to tensorboard; requires "
                "lorasmith[tensorboard]"
            )
        ),
    ] = False
    save_every: Annotated[
        Every,
        Field(
            description=_(
                "Save a checkpoint every N steps, or once per epoch with 'epoch'; 0 saves only at the end and on Ctrl-C"
            )
        ),
    ] = "epoch"
    keep_checkpoints: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_STEPS,
            description=_("Number of checkpoints to keep, the most recent ones; 0 keeps all of them"),
        ),
    ] = 1
    seed: Annotated[
        int,
        Field(ge=0, lt=2**32, description=_("Random seed for the initial A, the order of the examples and dropout")),
    ] = 0

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers of `report_to`, with 'tensorboard' if that option is on."""
        return tuple(dict.fromkeys((*self.report_to, *(("tensorboard",) if self.tensorboard else ()))))

    def with_usual_rate(self, parameters: int) -> Self:
        """These options with the default learning rate for a base model of so many parameters, if none is given."""
        if "learning_rate" in self.model_fields_set:
            return self
        changed = self.model_copy(update={"learning_rate": usual_rate(parameters, self.method)})
        changed.model_fields_set.discard("learning_rate")
        return changed

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate, or the usual one while the race of `auto` has not chosen one."""
        return USUAL_RATE if self.learning_rate == "auto" else self.learning_rate

    @field_validator("report_to")
    @classmethod
    def _known_trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in TRACKERS]
        if unknown:
            text = _("unknown tracker {name!r}: choose from {known}.", name=unknown[0], known=listed(TRACKERS))
            raise ValueError(text + did_you_mean(unknown[0], TRACKERS))
        return value

    @field_validator("samples")
    @classmethod
    def _not_blank(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        blank = [number for number, text in enumerate(value, 1) if not text.strip()]
        if blank:
            raise ValueError(_("prompt {number} is empty; write a prompt or remove it", number=blank[0]))
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _rate_of_method(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Each method has a default of its own; `with_usual_rate` adapts it to the base model."""
        method = values.get("method") if isinstance(values, dict) else None
        if method not in RATE_DIVISORS or "learning_rate" in values:
            return validate(values)
        made = validate({**values, "learning_rate": USUAL_RATE / RATE_DIVISORS[method]})
        made.model_fields_set.discard("learning_rate")
        return made

    @model_validator(mode="after")
    def _of_full(self) -> Self:
        if self.method != "full":
            return self
        given = {"start_from": self.start_from is not None, "loraplus_lr_ratio": self.loraplus_lr_ratio != 1}
        for key in (key for key, is_given in given.items() if is_given):
            raise ValueError(
                _("{key}: only for adapters, but method is 'full', which trains all weights; remove it", key=key)
            )
        if self.optimizer == "muon":
            raise ValueError(_("optimizer: 'muon' is only for adapters here; use 'adamw' with method 'full'"))
        return self

    @model_validator(mode="after")
    def _evaluated(self) -> Self:
        if self.patience and not self.eval_every:
            raise ValueError(
                _(
                    "patience: counts evaluations during training, but eval_every is 0; set eval_every to a "
                    "number of steps or to 'epoch'"
                )
            )
        for key in UNUSED_BY.get(self.optimizer, ()):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    _("{key}: the optimizer {name!r} does not use it; remove it", key=key, name=self.optimizer)
                )
        if self.min_learning_rate and self.schedule == "constant":
            raise ValueError(
                _(
                    "min_learning_rate: has no effect with the constant schedule; set schedule to 'linear' or "
                    "'cosine', or remove it"
                )
            )
        if self.learning_rate != "auto" and self.min_learning_rate > self.learning_rate:
            raise ValueError(
                _(
                    "min_learning_rate: {lowest:g} is above the peak, learning_rate {peak:g}; lower it",
                    lowest=self.min_learning_rate,
                    peak=self.learning_rate,
                )
            )
        if self.metric and not self.generate:
            raise ValueError(
                _(
                    "metric: scores generated answers, but generate is 0; set generate to the number of examples "
                    "to answer, for example 50"
                )
            )
        return self
