"""The demo's rows, the same tokens for both programs."""

from transformers import PreTrainedTokenizerBase

from lorasmith.data.conversation import Message
from lorasmith.data.read import read
from lorasmith.data.template import Template, cut
from lorasmith.demo import MAX_LENGTH, demo_files
from lorasmith.model.row import Example
from lorasmith.report import Report


def encoded_rows(tokenizer: PreTrainedTokenizerBase, count: int) -> list[Example]:
    """The first `count` rows to learn from, cut to 128 tokens."""
    template = Template.of(tokenizer)
    file, _held_out = demo_files(Report())
    records = read(str(file))[:count]
    messages = [[Message(**m) for m in record.fields["messages"]] for record in records]  # type: ignore[attr-defined]
    return [cut(template.encode(m, record.source), MAX_LENGTH) for m, record in zip(messages, records, strict=True)]
