"""The prompts whose greedy replies are compared: twenty, of several kinds and lengths, in English and Chinese."""

from lorasmith.data.rows.conversation import Message, RowError
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.golden import PROBES

QUESTIONS = (
    "Hello!",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences how a bicycle stays upright.",
    "Translate into German: The weather is lovely today, and we are going for a walk.",
    "List three differences between a list and a tuple in Python.",
    "Is the following review positive or negative? 'The soup was cold, and nobody apologized.'",
    'Answer with JSON only, with the keys "name" and "age": Maria is 34 years old.',
    "def fibonacci(n):",
    "你好！",
    "中国的首都是哪里？",
    "请用三句话介绍一下长城。",
    "把下面的句子翻译成英文：今天天气很好，我们去公园散步吧。",
    "写一首关于春天的短诗。",
    "这条评论是好评还是差评？“房间很干净，早餐也不错，下次还会来。”",
    "1、苹果 2、香蕉 3、",
)


def prompts_of(template: Template) -> list[tuple[list[dict[str, str]], list[int]]]:
    """The prompts that the template accepts: messages, and token ids as in training."""
    questions = [(Message("user", text),) for text in QUESTIONS]
    found = []
    for conversation in [*(probe[:end] for probe in PROBES for end in range(1, len(probe), 2)), *questions]:
        try:
            ids = template.encode_prompt(conversation)
        except RowError:
            continue
        found.append(([{"role": m.role, "content": m.content} for m in conversation], ids))
    return found
