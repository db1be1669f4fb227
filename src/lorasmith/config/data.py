"""Which examples, how they are rendered, what of them is learned, and what happens to long ones. Loads no torch."""

from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lorasmith.data.rows.forms import KNOWN_KEYS
from lorasmith.i18n import _

Learn = Literal["answers", "last-answer", "all"]
TooLong = Literal["error", "truncate", "truncate-left", "split", "drop"]
TEMPLATES = ("auto", "model", "human-assistant", "alpaca", "chatml")  # any other name is a file's


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
        str,
        Field(
            description=_(
                "how a row becomes text: model (its chat template), human-assistant, alpaca, chatml, or a Jinja file; "
                "auto is the model's, or human-assistant where it has none"
            )
        ),
    ] = "auto"
    system: Annotated[str, Field(description=_("system text before every conversation that has none"))] = ""
    learn: Annotated[
        Learn, Field(description=_("what is learned of a conversation: its answers, the last one, or all of it"))
    ] = "answers"
    max_length: Annotated[
        int | None, Field(gt=1, description=_("tokens of one example; 1024 or the model's limit where not given"))
    ] = None
    too_long: Annotated[
        TooLong,
        Field(
            description=_(
                "an example that does not fit: stop and say so, cut its end, cut its beginning and keep the answer, "
                "make pieces (plain text only), or leave it out"
            )
        ),
    ] = "error"

    @field_validator("template")
    @classmethod
    def _named_or_a_file(cls, name: str) -> str:
        if name in TEMPLATES or any(mark in name for mark in "./\\"):
            return name
        near = [_("Did you mean {near!r}?", near=word) for word in get_close_matches(name, TEMPLATES, 1)]
        text = _(
            "{name!r} is none of {known}; a Jinja file is named by its path, as in ./chat.jinja",
            name=name,
            known=", ".join(TEMPLATES),
        )
        raise ValueError(". ".join([text, *near]))

    @field_validator("map")
    @classmethod
    def _columns_we_know(cls, columns: dict[str, str]) -> dict[str, str]:
        for ours in columns:
            if ours not in KNOWN_KEYS:
                known = ", ".join(sorted(KNOWN_KEYS))
                raise ValueError(_("no form of rows has {ours!r}; known are {known}", ours=ours, known=known))
        return columns
