"""Tokenizers made here, with the chat templates of well known families: no file of any model is needed."""

import json
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<start_of_turn>", "<end_of_turn>", "<eos>"]  # fmt: skip
LINES = [
    "Human: what is the sky? Assistant: the sky is blue. user assistant system model",
    "考试有哪些技巧？先做会做的题。",
]

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- set today = strftime_now('%d %b %Y') %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday is ' + today + '\n\n<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}{%- for message in messages %}"
    "{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Shows an empty thought in the last answer only, as Qwen3's does: earlier turns change when a later one follows.
QWEN3 = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# The prompt opens a thought that a finished answer does not show, as DeepSeek-R1's does.
THOUGHT = QWEN3.replace("{{- '<|im_start|>assistant\n' }}", "{{- '<|im_start|>assistant\n<thought>' }}")
# Takes the thought out of answers before the last question, as Qwen3's does, and adds nothing.
STRIPPED = (
    "{%- set last = namespace(question=0) %}{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and '</think>' in content and loop.index0 < last.question %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# The prompt adds nothing, an answer begins with a blank, and a system text stands within the first question.
MISTRAL = (
    "{{- bos_token }}{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{- '<start_of_turn>' + (system if loop.index0 < 2 else '') + message.content + '<end_of_turn>' }}"
    "{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}{%- endif %}{%- endfor %}"
)
MARKED = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}{%- if message.role == 'assistant' %}"
    "{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{%- else %}"
    "{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Its marks leave the stop token out, so a model that learned by them would never stop.
MISMARKED = MARKED.replace("'<|im_end|>' }}{% endgeneration %}", "'' }}{% endgeneration %}{{- '<|im_end|>' }}")
TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls %}{{- '<tool_call>' + call.function | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
REWORDED = CHATML.replace("message['content']", "message['content'] | replace('very', 'very  ')")
ENDLESS = CHATML.replace("<|im_end|>", "")
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen2.5": QWEN25,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "thought": THOUGHT,
    "stripped": STRIPPED,
    "mistral": MISTRAL,
    "marked": MARKED,
    "mismarked": MISMARKED,
    "tools": TOOLS,
    "endless": ENDLESS,
    "reworded": REWORDED,
}

Make = Callable[..., PreTrainedTokenizerFast]


def _make(template: str | None = None, lines: list[str] = LINES) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    # As most tokenizers do: a begin token by itself, which would stand twice where the template writes one too.
    core.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 2)])
    # pad is eos, as in most folders: what is learned must not depend on it
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin|>", eos_token="<eos>", pad_token="<eos>",
        extra_special_tokens=SPECIAL[:2] + SPECIAL[3:8],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATES[template] if template else None
    return tokenizer


@pytest.fixture(scope="session")
def make() -> Make:
    """`make(template)`: a tokenizer of about 400 tokens with the named chat template, or with none."""
    return _make


@pytest.fixture
def write(tmp_path):
    """`write(name, content)`: a file in an empty folder; rows become JSONL."""

    def write(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
