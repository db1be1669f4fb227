"""Probe conversations: their token ids are stored with an adapter, to verify the tokenizer when it is loaded."""

from typing import TYPE_CHECKING, Any

from lorasmith.data.rows.conversation import Message
from lorasmith.errors import AdapterError
from lorasmith.i18n import _

if TYPE_CHECKING:
    from lorasmith.data.template.encoding import Template

PROBES: tuple[tuple[Message, ...], ...] = (
    (Message("user", "Why is the sky blue?"), Message("assistant", "Because air scatters blue light most.")),
    (Message("user", "考试有哪些技巧？"), Message("assistant", "先做会做的题，再检查一遍。")),
    (
        Message("user", "2 + 2 = ?"),
        Message("assistant", "4\n\n  def f(x): return x*2  # naïve 🙂"),
        Message("user", "Thanks!\nAnd 3?"),
        Message("assistant", " 5 "),
    ),
)


def golden_conversations(template: "Template") -> list[dict[str, Any]]:
    """The probes that this template accepts, each with its token ids, for JSON."""
    return [
        {"messages": [message._asdict() for message in probe], "ids": ids}
        for probe in PROBES
        if (ids := template.probe_ids(probe))
    ]


def verify_tokenizer(template: "Template", data: dict[str, Any]) -> None:
    """Compare stop tokens and probe conversations with those in `data`, made by `Template.to_json`.

    Raises AdapterError with the first token that differs.
    """
    for stop in data["stop"]:
        if template.token(stop["id"]) != stop["token"]:
            raise AdapterError(
                _(
                    "this is not the tokenizer that the adapter was trained with: stop token {id} is "
                    "{found}, but was {wanted} in training.",
                    id=stop["id"],
                    found=repr(template.token(stop["id"])),
                    wanted=repr(stop["token"]),
                )
            )
    for golden in data["golden"]:
        probe = [Message(**message) for message in golden["messages"]]
        _compare(template, template.probe_ids(probe), golden["ids"])


def _compare(template: "Template", found: list[int], wanted: list[int]) -> None:
    if found == wanted:
        return
    pairs = enumerate(zip(found, wanted, strict=False))
    at = next((i for i, (now, then) in pairs if now != then), min(len(found), len(wanted)))
    raise AdapterError(
        _(
            "this is not the tokenizer that the adapter was trained with: token {at} of a test "
            "conversation is {found}, but was {wanted} in training. Use the base model that the adapter "
            "was trained on.",
            at=at,
            found=f"{found[at]} {template.token(found[at])!r}" if at < len(found) else _("missing"),
            wanted=wanted[at] if at < len(wanted) else _("none"),
        )
    )
