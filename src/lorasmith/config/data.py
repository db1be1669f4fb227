"""Options of the data: which examples, how they become text, what is trained on, and what to do with long ones.

Loads no torch.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from lorasmith.config.files import Malformed, parse_json
from lorasmith.config.values import CommandLineText, Typed, did_you_mean
from lorasmith.i18n import _, listed

Learn = Literal["answers", "last-answer", "all"]
TooLong = Literal["error", "truncate", "truncate-left", "split", "drop"]
TEMPLATES = ("auto", "model", "human-assistant", "alpaca", "chatml")  # anything else is the path of a file
# The arguments with which a chat template is rendered; its other variables are free.
RENDERING = frozenset({
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
})  # fmt: skip
# The columns that the row formats of data/rows/formats.py read; a test keeps the two in step.
COLUMNS = (
    "completion", "conversations", "history", "input", "instruction", "messages", "output", "prompt", "system", "text",
    "tools",
)  # fmt: skip


class DataConfig(Typed):
    """The [data] section: the training examples and the held-out ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Annotated[
        tuple[str, ...],
        Field(
            description=_(
                "Training examples: JSON, JSONL, CSV, TSV (also .gz, .zst), Parquet, a folder saved by "
                "`datasets`, or the name of a dataset on a hub (org/name or modelscope:org/name); to mix "
                "files, add weights: FILE:0.7 FILE:0.3; to use some rows only, add their number: FILE#500"
            )
        ),
    ] = ()
    max_samples: Annotated[
        int | None,
        Field(
            gt=0,
            le=1_000_000_000,
            description=_("Maximum number of rows of each file, a random sample; all rows if not given"),
        ),
    ] = None
    map: Annotated[
        dict[str, str],
        Field(description=_("Columns with other names than expected, as in instruction=question output=answer")),
    ] = {}  # noqa: RUF012  pydantic copies it
    held_out: Annotated[
        float | str,
        Field(
            description=_(
                "Examples held out for evaluation: a file, a number of rows, or a fraction below 1 (at most "
                "200 rows); 0 holds out none"
            )
        ),
    ] = 0.05
    template: Annotated[
        str,
        Field(
            description=_(
                "How a row becomes text: model (the model's chat template), human-assistant, alpaca, chatml, "
                "or the path of a Jinja file; auto uses the model's template, or human-assistant if it has none"
            )
        ),
    ] = "auto"
    template_kwargs: Annotated[
        dict[str, bool | int | float | str],
        Field(description=_("Variables of the chat template, as in enable_thinking=false")),
    ] = {}  # noqa: RUF012  pydantic copies it
    system: Annotated[str, Field(description=_("System message for conversations that do not have one"))] = ""
    learn: Annotated[
        Learn,
        Field(
            description=_(
                "Which parts of a conversation to train on: all answers, only the last answer, or the whole text"
            )
        ),
    ] = "answers"
    max_length: Annotated[
        int | None,
        Field(
            gt=1,
            le=10_000_000,
            description=_(
                "Maximum length of an example in tokens; defaults to 1024, or to the model's context length if "
                "that is shorter"
            ),
        ),
    ] = None
    too_long: Annotated[
        TooLong,
        Field(
            description=_(
                "What to do with an example that is too long: stop with an error, truncate its end, truncate "
                "its beginning and keep the answer, split it into pieces (plain text only), or drop it"
            )
        ),
    ] = "error"

    @field_validator("template")
    @classmethod
    def _named_or_a_file(cls, name: str) -> str:
        if name in TEMPLATES or any(mark in name for mark in "./\\"):
            return name
        text = _(
            "{name!r} is not one of {known}; to use a Jinja file, give its path, as in './chat.jinja'.",
            name=name,
            known=listed(TEMPLATES),
        )
        raise ValueError(text + did_you_mean(name, TEMPLATES))

    @field_validator("template_kwargs", mode="before")
    @classmethod
    def _values_of_flags(cls, variables: Any) -> Any:
        """On the command line, `false` is a boolean and `3` a number, as in JSON; anything else is text."""
        if not isinstance(variables, dict):
            return variables
        return {name: _value(word) if isinstance(word, CommandLineText) else word for name, word in variables.items()}

    @field_validator("template_kwargs")
    @classmethod
    def _free_names(cls, variables: dict[str, bool | int | float | str]) -> dict[str, bool | int | float | str]:
        for name in variables:
            if not name.isidentifier() or name in RENDERING:
                text = _("{name!r} cannot be set: it is not a name, or lorasmith sets it itself", name=name)
                raise ValueError(text)
        return variables

    @field_validator("map")
    @classmethod
    def _columns_we_know(cls, columns: dict[str, str]) -> dict[str, str]:
        for ours in columns:
            if ours not in COLUMNS:
                known = listed(sorted(COLUMNS))
                raise ValueError(
                    _(
                        "unknown column {ours!r}: no row format uses it; known columns are {known}",
                        ours=ours,
                        known=known,
                    )
                )
        return columns


def _value(word: str) -> bool | int | float | str:
    try:
        value = parse_json(word)
    except Malformed:
        return str(word)
    return value if isinstance(value, bool | int | float | str) else str(word)
