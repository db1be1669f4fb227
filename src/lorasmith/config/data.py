"""Options of the data: which examples, how they become text, what is trained on, and what to do with long ones.

Loads no torch.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from lorasmith.config.files import Malformed, parse_json
from lorasmith.config.values import CommandLineText, Typed, did_you_mean
from lorasmith.i18n import _, listed

Learn = Literal["answers", "last-answer", "all"]
SystemAs = Literal["system", "first", "user"]
SpecialTokens = Literal["text", "tokens"]
LeadingAnswer = Literal["error", "drop"]
TooLong = Literal["error", "truncate", "truncate-left", "split", "drop"]
TEMPLATES = ("auto", "model", "human-assistant", "alpaca", "chatml")  # anything else is the path of a file
# The arguments with which a chat template is rendered; its other variables are free.
RENDERING = frozenset({
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
})  # fmt: skip
ROLES = ("system", "user", "assistant", "tool")
# The columns that the row formats of data/rows/formats.py read; a test keeps the two in step.
COLUMNS = (
    "chosen", "completion", "conversation", "conversations", "functions", "history", "input", "instruction", "kto_tag",
    "label", "messages", "output", "prompt", "rejected", "rejected_messages", "rejected_response", "system", "text",
    "tools",
)  # fmt: skip


class DataConfig(Typed):
    """The [data] section: the training examples and the held-out ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Annotated[
        tuple[str, ...],
        Field(
            description=_(
                "Training examples: JSON, JSONL, CSV, TSV (also .gz, .zst), Parquet, Arrow, text, a folder saved by "
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
        Field(
            description=_(
                "Columns with other names than expected, as in instruction=question output=answer; for one file "
                "only, as in talks.jsonl:messages=dialog"
            )
        ),
    ] = {}  # noqa: RUF012  pydantic copies it
    fill: Annotated[
        dict[str, str],
        Field(description=_("Texts for placeholders in the rows: name=Ada puts Ada in place of {{name}}")),
    ] = {}  # noqa: RUF012
    roles: Annotated[
        dict[str, str],
        Field(
            description=_(
                "Roles of messages with other names than expected, as in customer=user agent=assistant; the roles are "
                "system, user, assistant and tool"
            )
        ),
    ] = {}  # noqa: RUF012
    skip_bad_rows: Annotated[
        float,
        Field(
            ge=0,
            le=1_000_000_000,
            description=_(
                "How many rows with problems may be left out, as a number or a fraction below 1 of each file's rows; "
                "they are listed. With more of them, nothing is trained"
            ),
        ),
    ] = 0.0
    held_out: Annotated[
        float | str,
        Field(
            description=_(
                "Examples held out for evaluation: a file, a number of rows, or a fraction below 1 (at most "
                "200 rows); 0 holds out none"
            )
        ),
    ] = 0.05
    held_out_seed: Annotated[
        int | None,
        Field(
            ge=0,
            lt=2**32,
            description=_(
                "Random seed of the choice of the held-out rows; training.seed if not given. With it, runs of "
                "different seeds are evaluated on the same rows"
            ),
        ),
    ] = None
    train_rows: Annotated[
        float | None,
        Field(
            gt=0,
            le=1_000_000_000,
            description=_(
                "How many of the rows that are not held out to train on, as a number or a fraction up to 1: a random "
                "sample; all of them if not given"
            ),
        ),
    ] = None
    template: Annotated[
        str,
        Field(
            description=_(
                "How a row becomes text: model (the model's chat template), human-assistant, alpaca, chatml, "
                "the name of one of several templates of the model, or the path of a Jinja file; auto uses the model's "
                "template, or human-assistant if it has none"
            )
        ),
    ] = "auto"
    template_kwargs: Annotated[
        dict[str, bool | int | float | str],
        Field(description=_("Variables of the chat template, as in enable_thinking=false")),
    ] = {}  # noqa: RUF012  pydantic copies it
    system: Annotated[str, Field(description=_("System message for conversations that do not have one"))] = ""
    system_as: Annotated[
        SystemAs,
        Field(
            description=_(
                "Where system messages go: where they are, joined into the first message, or before the text of the "
                "next user message, for chat templates that have no place for them"
            )
        ),
    ] = "system"
    leading_answer: Annotated[
        LeadingAnswer,
        Field(description=_("What to do with answers before the first question: stop with an error, or drop them")),
    ] = "error"
    special_tokens: Annotated[
        SpecialTokens,
        Field(
            description=_(
                "How to encode special tokens that are spelled in messages, such as <|im_end|>: as ordinary text, or "
                "as special tokens"
            )
        ),
    ] = "text"
    add_tokens: Annotated[
        tuple[str, ...],
        Field(
            description=_(
                "Tokens to add to the vocabulary, such as <|call|>, which rows and prompts may contain; only their "
                "rows of the input embedding and the output head are trained"
            )
        ),
    ] = ()
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
                "Maximum length of an example in tokens; defaults to 1024, or to what the longest row needs, if the "
                "model and the memory allow it"
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
    def _no_misspelling(cls, name: str) -> str:
        """Refuse what is nearly a known name; whether the model has a template with another name is not known yet."""
        hint = "" if name in TEMPLATES or any(mark in name for mark in "./\\") else did_you_mean(name, TEMPLATES)
        if hint:
            text = _(
                "{name!r} is not one of {known}; to use a Jinja file, give its path, as in './chat.jinja'.",
                name=name,
                known=listed(TEMPLATES),
            )
            raise ValueError(text + hint)
        return name

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

    @field_validator("add_tokens")
    @classmethod
    def _tokens_that_can_be_told(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        for token in tokens:
            if not token or token != token.strip():
                text = _("{token!r} is empty, or begins or ends with white space, so it is no token", token=token)
                raise ValueError(text)
            if tokens.count(token) > 1:
                raise ValueError(_("{token!r} is given twice; give it once", token=token))
        return tokens

    @field_validator("map")
    @classmethod
    def _columns_we_know(cls, columns: dict[str, str]) -> dict[str, str]:
        for key in columns:
            ours = key.rpartition(":")[2]
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

    @field_validator("roles")
    @classmethod
    def _roles_we_know(cls, roles: dict[str, str]) -> dict[str, str]:
        for theirs, ours in roles.items():
            if ours not in ROLES:
                text = _("{theirs}={ours}: {ours!r} is not a role; the roles are {known}", theirs=theirs, ours=ours,
                         known=listed(ROLES))  # fmt: skip
                raise ValueError(text + did_you_mean(ours, ROLES))
        return roles

    @field_validator("skip_bad_rows", "train_rows")
    @classmethod
    def _whole_or_a_fraction(cls, number: float | None) -> float | None:
        if number is not None and number > 1 and number != int(number):
            raise ValueError(_("must be a whole number of rows, or a fraction below 1"))
        return number

    def map_of(self, file: str) -> dict[str, str]:
        """The columns of `map` for a file, given as in `data` or `held_out`: those for it alone take precedence."""
        own = {key.rpartition(":"): theirs for key, theirs in self.map.items()}
        general = {ours: theirs for (name, _colon, ours), theirs in own.items() if not name}
        return general | {ours: theirs for (name, _colon, ours), theirs in own.items() if name and is_file(name, file)}


def is_file(name: str, file: str) -> bool:
    """Whether `name`, a path or only the name of a file, means `file`."""
    return name in (file, file.replace("\\", "/").rpartition("/")[2])


def _value(word: str) -> bool | int | float | str:
    try:
        value = parse_json(word)
    except Malformed:
        return str(word)
    return value if isinstance(value, bool | int | float | str) else str(word)
