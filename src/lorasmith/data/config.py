"""Which examples, how they are rendered, and what happens to long ones. Pydantic only: loads no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lorasmith.data.forms import KNOWN_KEYS
from lorasmith.i18n import _


class DataConfig(BaseModel):
    """The examples to learn from and the ones held out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Annotated[
        tuple[str, ...],
        Field(
            description=_(
                "examples: JSON, JSONL, CSV, TSV (also .gz, .zst), Parquet, a folder that `datasets` saved, a hub's "
                "org/name or modelscope:org/name; FILE:0.7 FILE:0.3 for parts of an epoch"
            )
        ),
    ] = ()
    map: Annotated[
        dict[str, str],
        Field(description=_("columns under other names: instruction=question output=answer")),
    ] = {}
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

    @field_validator("map")
    @classmethod
    def _columns_we_know(cls, columns: dict[str, str]) -> dict[str, str]:
        for ours in columns:
            if ours not in KNOWN_KEYS:
                known = ", ".join(sorted(KNOWN_KEYS))
                raise ValueError(_("no form of rows has {ours!r}; known are {known}", ours=ours, known=known))
        return columns
