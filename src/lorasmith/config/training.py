"""How the adapter is trained. Pydantic only: loads no torch."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lorasmith.i18n import _


class TrainingConfig(BaseModel):
    """One run of AdamW over the examples. The source of each default stands in docs/decisions.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: Annotated[int, Field(gt=0, description=_("examples in one micro-batch, in the usual meaning"))] = 8
    accumulate: Annotated[
        int,
        Field(gt=0, description=_("micro-batches in one step; a step learns from batch_size x accumulate examples")),
    ] = 1
    epochs: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description=_("passes over the examples, where max_steps is not given"))
    ] = 1.0
    max_steps: Annotated[int | None, Field(gt=0, description=_("stop after this many steps"))] = None
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False, description=_("highest learning rate"))] = 2e-4
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Field(description=_("how the learning rate falls after the warm-up"))
    ] = "linear"
    warmup: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description=_("warm-up in steps, or a part of all steps where below 1"))
    ] = 0.03
    beta1: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, description=_("AdamW's beta1"))] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, description=_("AdamW's beta2"))] = 0.999
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False, description=_("AdamW's epsilon"))] = 1e-8
    weight_decay: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description=_("AdamW's decoupled weight decay"))
    ] = 0.0
    clip: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description=_("largest norm of the gradient; 0 for no clipping"))
    ] = 1.0
    gradient_checkpointing: Annotated[
        bool, Field(description=_("recompute activations in backward: less memory, slower"))
    ] = False
    row_tokens: Annotated[
        int, Field(gt=0, description=_("tokens that one forward may hold; fewer need less memory"))
    ] = 2048
    log_every: Annotated[int, Field(gt=0, description=_("steps between two lines of metrics.jsonl"))] = 1
    eval_every: Annotated[
        int, Field(ge=0, description=_("steps between two held-out evaluations; 0: before and after only"))
    ] = 0
    patience: Annotated[
        int, Field(ge=0, description=_("stop after so many evaluations without a better held-out loss; 0: never"))
    ] = 0
    samples: Annotated[
        tuple[str, ...], Field(description=_("prompts that are answered at every evaluation, for samples.jsonl"))
    ] = ()
    generate: Annotated[
        int, Field(ge=0, description=_("held-out rows that are answered at every evaluation, measured as in eval"))
    ] = 0
    max_new_tokens: Annotated[int, Field(gt=0, description=_("longest of these answers in tokens"))] = 256
    metric: Annotated[
        tuple[str, ...], Field(description=_("measures of your own of these answers, each FILE.py:FUNCTION as in eval"))
    ] = ()
    tensorboard: Annotated[
        bool, Field(description=_("the metrics as event files in RUN/tensorboard too; needs lorasmith[tensorboard]"))
    ] = False
    save_every: Annotated[
        int | Literal["epoch"],
        Field(description=_("steps between two checkpoints, or epoch; 0: only at the end and on Ctrl-C")),
    ] = "epoch"
    seed: Annotated[int, Field(ge=0, lt=2**32, description=_("decides the initial A, the order and the dropout"))] = 0

    @field_validator("save_every")
    @classmethod
    def _not_negative(cls, value: int | Literal["epoch"]) -> int | Literal["epoch"]:
        if isinstance(value, int) and value < 0:
            raise ValueError(_("{value} is not allowed: must be at least 0, or epoch", value=value))
        return value

    @field_validator("samples")
    @classmethod
    def _not_blank(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        blank = [number for number, text in enumerate(value, 1) if not text.strip()]
        if blank:
            raise ValueError(_("prompt {number} is empty; write one or leave it out", number=blank[0]))
        return value

    @model_validator(mode="after")
    def _evaluated(self) -> Self:
        if self.patience and not self.eval_every:
            raise ValueError(
                _("patience: it counts evaluations during the training, and eval_every is 0; say how often, in steps")
            )
        if self.metric and not self.generate:
            raise ValueError(_("metric: it judges answers, and generate is 0; say how many rows to answer, as in 50"))
        return self
