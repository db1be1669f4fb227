"""Which keys of a message hold its role and its content, and what the names of roles stand for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorasmith.config.data import ROLES
from lorasmith.data.rows.marks import MARKS

CALL = "call"  # a message whose content is function calls
MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected",
                   "rejected_messages", "rejected_response")  # fmt: skip
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")

_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "function_call": CALL,
    "tool_call": CALL,
}
# Of keys; XTuner's are input and output. A message's 'model' is the name of the model that wrote it.
_PAIRS = {name: role for name, role in _NAMES.items() if name != "model"} | {"input": "user", "output": "assistant"}


@dataclass(frozen=True)
class MessageStyle:
    """The keys of role and content in a message, and the role that each name stands for. shown: names for messages."""

    role: str
    content: str
    roles: Mapping[str, str]
    shown: tuple[str, ...]

    def role_of(self, message: object) -> str | None:
        """The role of a message: one of `ROLES`, or `CALL`; None if it has none that is known."""
        name = message.get(self.role) if isinstance(message, dict) else None
        return self.roles.get(name) if isinstance(name, str) else None

    @property
    def answer(self) -> str:
        """The name of the role 'assistant'."""
        return next(name for name in self.shown if self.roles[name] == "assistant")


# In OpenAI's files, 'function' is the result of a call; in ShareGPT's, it is the call.
OPENAI = MessageStyle("role", "content", _NAMES | {"function": "tool"}, ROLES)
SHAREGPT = MessageStyle(
    "from", "value", _NAMES | {"function": CALL}, ("human", "gpt", "system", "function_call", "observation")
)


def detect_style(messages: list[object]) -> MessageStyle:
    """The style of a list of messages, by the keys of the first message that has `role` or `from`.

    The other key, `content` or `value`, usually belongs to it; `role` with `value` and `from` with `content` occur too.
    """
    for message in messages:
        if isinstance(message, dict) and not message.keys().isdisjoint(ROLE_KEYS):
            style, other = (OPENAI, "value") if "role" in message else (SHAREGPT, "content")
            is_mixed = other in message and style.content not in message
            return replace(style, content=other) if is_mixed else style
    return OPENAI


def expand_pairs(messages: list[object]) -> list[object]:
    """The messages, with {"human": ..., "assistant": ...} as two of them: each key that is a role is a message.

    Marks of what is trained on belong to the answer.
    """
    if all(isinstance(message, dict) and ("role" in message or "from" in message) for message in messages):
        return messages
    return [one for message in messages for one in _expanded(message)]


def _expanded(message: object) -> list[object]:
    if not isinstance(message, dict) or not message or not message.keys().isdisjoint(ROLE_KEYS):
        return [message]
    names = [name for name in message if name in _PAIRS]
    roles = {_PAIRS[name] for name in names}
    if len(names) < len(message) and not {"user", "assistant"} <= roles:
        return [message]
    marks = {key: value for key, value in message.items() if key in MARKS}
    return [
        {"role": _PAIRS[name] if name in ("input", "output") else name, "content": message[name]}
        | (marks if _PAIRS[name] == "assistant" else {})
        for name in names
        if message[name] or _PAIRS[name] != "system"
    ]


def rename_roles(row: Mapping[str, object], roles: Mapping[str, str]) -> tuple[dict[str, object], set[str]]:
    """The row with the roles of its messages renamed as `data.roles` says, and the names that it has."""
    found = set[str]()

    def renamed(message: object) -> object:
        if not isinstance(message, dict):
            return message
        key = next((key for key in ROLE_KEYS if key in message), None)
        names = message.keys() if key is None else {message[key]} if isinstance(message[key], str) else set()
        found.update(names & roles.keys())
        if key is None:  # a pair
            return {roles.get(name, name): value for name, value in message.items()}
        return message | {key: roles[message[key]]} if names & roles.keys() else message

    lists = {key: value for key, value in row.items() if key in MESSAGE_COLUMNS and isinstance(value, list)}
    return {**row, **{key: [renamed(message) for message in messages] for key, messages in lists.items()}}, found


def unread_keys(message: object, read: frozenset[str]) -> set[str]:
    """The keys of a message that nobody reads: neither in `read` nor the role of a pair, with any value but null."""
    if not isinstance(message, dict) or message.keys() <= read:
        return set()
    pairs = set() if _expanded(message) == [message] else _PAIRS.keys()
    return {key for key, value in message.items() if value is not None and key not in read and key not in pairs}
