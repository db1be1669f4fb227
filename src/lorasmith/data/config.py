"""Which examples, how they are rendered, and what happens to long ones. Pydantic only: loads no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.i18n import _


class DataConfig(BaseModel):
    """The examples to learn from and the ones held out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Annotated[
        tuple[str, ...], Field(description=_("files of examples: JSON, JSONL, or a folder that `datasets` saved"))
    ] = ()
    held_out: Annotated[
        float | str,
        Field(
            description=_(
                "examples never trained on: a file, a number of rows, or a part below 1 (at most 200 rows); 0 for none"
            )
        ),
    ] = 0.05
    template: Annotated[
        Literal["auto", "model", "human-assistant"],
        Field(description=_("how a row becomes text: the model's chat template, or Human: / Assistant:")),
    ] = "auto"
    max_length: Annotated[
        int | None, Field(gt=1, description=_("tokens of one example; 1024 or the model's limit where not given"))
    ] = None
    too_long: Annotated[
        Literal["error", "truncate", "drop"],
        Field(description=_("an example whose answer does not fit: stop and say so, cut its end, or leave it out")),
    ] = "error"
