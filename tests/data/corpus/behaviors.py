"""Small chat templates, each with one behavior that real ones have and that a trainer gets wrong easily."""

from typing import NamedTuple


class Behaving(NamedTuple):
    """A template and its tokens. like: real templates that do the same."""

    text: str
    eos: str
    ends: tuple[str, ...]
    like: str


def _chat(answer: str, prompt: str = "{{ '<|im_start|>assistant\n' }}", before: str = "", user: str = "") -> str:
    """A template in the manner of ChatML. answer, prompt, user: Jinja for these parts; before: for the beginning."""
    user = user or "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    return (
        before
        + "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        + answer
        + "{%- else %}"
        + user
        + "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
        + prompt
        + "{%- endif %}"
    )


IM_END = ("<|im_end|>",)
PLAIN = "{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}"
CALLS = (
    "{{ '<|im_start|>assistant\n' + m.content }}{%- for c in m.tool_calls %}{{ '<tool_call>' + c.function.name + ' ' + "
    "ARGUMENTS + '</tool_call>' }}{%- endfor %}{{ '<|im_end|>\n' }}"
)
TOOLS = "{%- if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}"
BY_KEY = (
    "{{ '<|im_start|>assistant\n' }}{%- if m.KEY %}{{ '<think>\n' + m.KEY + '\n</think>\n\n' }}{%- endif %}"
    "{{ m.content + '<|im_end|>\n' }}"
)

BEHAVIORS = {
    "opened thought in the prompt": Behaving(
        _chat(PLAIN, "{{ '<|im_start|>assistant\n<think>\n' }}"), *IM_END, IM_END, "DeepSeek-R1, QwQ"
    ),
    "empty thought in the prompt": Behaving(
        _chat(PLAIN, "{{ '<|im_start|>assistant\n<|channel>thought\n<channel|>' }}"), *IM_END, IM_END, "Gemma 4"
    ),
    "prompt that shares half a token": Behaving(
        _chat(
            "{{ '<|im_start|>assistant\n<|START_RESPONSE|>' + m.content + '<|im_end|>\n' }}",
            "{{ '<|im_start|>assistant\n<|START_THINKING|>' }}",
        ),
        *IM_END, IM_END, "Command R7B",
    ),
    "no generation prompt": Behaving(_chat(PLAIN, "").replace("add_generation_prompt", "false"), *IM_END, IM_END, "-"),
    "other blank lines before the prompt": Behaving(
        _chat("{{ '\n\n### Response:\n' + m.content + '</s>' }}", "{{ '### Response:\n' }}", user="{{ m.content }}"),
        "</s>", ("</s>",), "Llama 4, Baichuan 2",
    ),
    "the next role ends an answer": Behaving(
        _chat(
            "{{ '<|assistant|>\n' + m.content }}", "{{ '<|assistant|>\n' }}",
            user="{{ '<|' + m.role + '|>\n' + m.content }}{# <|user|> <|tool|> <|system|> #}",
        ),
        "<|endoftext|>", ("<|endoftext|>", "<|user|>", "<|tool|>"), "GLM-4",
    ),
    "no end at all": Behaving(
        _chat("{{ '<AI>' + m.content }}", "{{ '<AI>' }}", user="{{ '<用户>' + m.content }}"),
        "</s>", ("</s>",), "MiniCPM",
    ),
    "a second end after the last answer": Behaving(
        _chat("{{ '<|assistant|>\n' + m.content + '<|end|>\n' }}", "{{ '<|assistant|>\n' }}",
              user="{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}")
        + "{%- if not add_generation_prompt %}{{ eos_token }}{%- endif %}",
        "<|endoftext|>", ("<|endoftext|>", "<|end|>"), "Phi-3",
    ),
    "several tokens close an answer": Behaving(
        _chat("{{ '<|im_start|>assistant\n' + m.content + '<|close|>answer<|sep|><|end_of_msg|>' }}"),
        "<|end_of_msg|>", ("<|end_of_msg|>",), "Kimi K3",
    ),
    "reasoning under reasoning_content": Behaving(
        _chat(BY_KEY.replace("KEY", "reasoning_content")), *IM_END, IM_END, "Qwen3"
    ),
    "reasoning under thinking": Behaving(_chat(BY_KEY.replace("KEY", "thinking")), *IM_END, IM_END, "gpt-oss, granite"),
    "reasoning of the last answer only": Behaving(
        _chat(BY_KEY.replace("m.KEY %}", "m.KEY and loop.last %}").replace("KEY", "reasoning_content")),
        *IM_END, IM_END, "Qwen3, GLM-4.5",
    ),
    "reasoning cut out of the content": Behaving(
        _chat(PLAIN.replace("m.content", "m.content.split('</think>')[-1].lstrip()")), *IM_END, IM_END, "DeepSeek-V3.1"
    ),
    "empty thought before every answer": Behaving(
        _chat(PLAIN.replace("assistant\n'", "assistant\n<think>\n\n</think>\n\n'")),
        *IM_END, IM_END, "Qwen3 without thinking",
    ),
    "contents as parts": Behaving(
        _chat(PLAIN, user="{{ '<|im_start|>' + m.role + '\n' + m.content[0].text + '<|im_end|>\n' }}").replace(
            "+ m.content +", "+ m.content[0].text +"
        ),
        *IM_END, IM_END, "LLaVA, Idefics 3",
    ),
    "arguments as an object": Behaving(
        _chat(CALLS.replace("ARGUMENTS", "c.function.arguments | tojson"), before=TOOLS), *IM_END, IM_END, "Qwen2.5"
    ),
    "arguments as text": Behaving(
        _chat(CALLS.replace("ARGUMENTS", "c.function.arguments"), before=TOOLS), *IM_END, IM_END, "DeepSeek-V3"
    ),
    "raises without the calls": Behaving(
        _chat(
            CALLS.replace("ARGUMENTS", "c.function.arguments | tojson"),
            before=TOOLS
            + "{%- for m in messages %}{%- if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
            "{{ raise_exception('a result without a call') }}{%- endif %}{%- endfor %}",
        ),
        *IM_END, IM_END, "Mistral Nemo, gpt-oss",
    ),
    "tools are not shown": Behaving(
        _chat(CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")), *IM_END, IM_END, "DeepSeek-R1-Distill"
    ),
    "calls are not shown": Behaving(_chat(PLAIN, before=TOOLS), *IM_END, IM_END, "LFM2"),
    "text beside a call is lost": Behaving(
        _chat(
            CALLS.replace("ARGUMENTS", "c.function.arguments | tojson").replace(
                "m.content }}", "(m.content if not m.tool_calls else '') }}"
            ),
            before=TOOLS,
        ),
        *IM_END, IM_END, "Llama 3, granite",
    ),
    "no place for a system message": Behaving(
        _chat(
            PLAIN, user="{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
        ),
        *IM_END, IM_END, "ChatGLM, Falcon",
    ),
    "a system message in prompts only": Behaving(
        _chat(
            "{{ m.content + '</s>' }}", "",
            user="{{ '[INST]' + (messages[0].content + '\n\n' if loop.last and messages[0].role == 'system' else '') + "
            "m.content + '[/INST]' }}",
        ).replace("{%- for m in messages %}", "{%- for m in messages if m.role != 'system' %}"),
        "</s>", ("</s>",), "Mistral Nemo",
    ),
    "generation tags": Behaving(
        _chat(
            "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
            "{{ '\n' }}"
        ),
        *IM_END, IM_END, "TRL's training templates",
    ),
    "generation tags around the role": Behaving(
        _chat(
            "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>' }}{% endgeneration %}"
            "{{ '\n' }}"
        ),
        *IM_END, IM_END, "TRL's DeepSeek-V3",
    ),
}  # fmt: skip
