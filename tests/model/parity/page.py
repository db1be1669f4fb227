"""docs/families.md and .zh.md: what works with each causal family of transformers, as `make parity` found it."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.model.parity.trial import DTYPES, RANDOM, REPEATED

VERDICTS = ("packed", "padded", "one by one", "refused", "fails", "not built")
ENGLISH = """# Model families

*[中文](families.zh.md)*

This page shows what lorasmith does with each of the {count} causal model families of transformers {transformers}. `make parity` made it: for each family it builds a tiny random model, loads it as a user would, adds LoRA to
all linear layers, and compares the results with transformers' and with those of PEFT {peft}: a new adapter changes nothing; loss and gradients of a batch equal those of its examples alone; a step lowers the loss;
PEFT loads the saved adapter and computes the same logits and gradients; the adapter can be merged; and prompts answered together get the tokens that they get alone. [compatibility.md](compatibility.md) shows the chat templates.

- **packed**: examples are concatenated without padding. This is the fastest layout.
- **padded**: examples are padded to the same length.
- **one by one**: padding changes what this model computes, so each example is computed alone.
- **refused**: an error names the reason before the training.
- **fails**: something does not work yet; the last column says what.
- **not built**: no tiny model of this family could be made, or not in three minutes.

In bfloat16, results may be as far from those in float32 as PEFT's are. With some adapters, rounding changes the expert that a router chooses, and the results by far more than rounding, so a family fails only if
it fails with each of three random adapters; the last column says what was found with the others.
The column "PEFT" shows whether PEFT {peft} makes of the saved adapter what it is. It rewrites the names of some layers when it loads an adapter, and then leaves out the tensors whose names it does not find:
in laguna and inkling2_text it loses the same tensors of adapters that it saved itself, because a pattern of transformers for names in old checkpoints also matches the new names.
The column "difference" is the largest relative difference of gradients, in float32, between a batch and its examples alone, and between lorasmith and PEFT.

{counts}

## By family

{rows}
"""
CHINESE = """# 模型系列

*[English](families.md)*

本页列出 lorasmith 对 transformers {transformers} 的全部 {count} 个因果语言模型系列的支持情况。本页由 `make parity` 生成：它为每个系列构造一个随机初始化的微型模型，像用户那样加载它，给所有线性层加上 LoRA，
并与 transformers 和 PEFT {peft} 的结果比较：新的适配器不改变任何结果；一个批次的损失和梯度等于其中各个样本单独计算的结果；一步训练使损失下降；PEFT 能加载保存的适配器，并得到相同的 logits 和梯度；
适配器可以合并；一起回答的多个提示词得到的 token 与单独回答时相同。聊天模板见 [compatibility.zh.md](compatibility.zh.md)。

- **packed**：样本首尾相接，不用填充。这是最快的方式。
- **padded**：样本填充到相同的长度。
- **one by one**：填充会改变这个模型的计算结果，所以逐个计算样本。
- **refused**：训练之前报错，说明原因。
- **fails**：目前还有不能用的地方，见最后一列。
- **not built**：无法构造这个系列的微型模型，或三分钟内无法完成。

在 bfloat16 下，与 float32 结果的差距不得大于 PEFT 的差距。对某些适配器，舍入误差会改变路由器选择的专家，使结果的变化远大于舍入误差，所以只有三个随机适配器都失败时才算失败；最后一列列出其余适配器的情况。
“PEFT”一列说明 PEFT {peft} 能否正确加载保存的适配器。加载时，它会改写某些层的名字，并丢掉找不到名字的张量：
对于 laguna 和 inkling2_text，它自己保存的适配器也会丢失同样的张量，因为 transformers 用来改写旧检查点名字的模式也匹配新名字。
“差异”一列是 float32 下梯度的最大相对差异：批次与单个样本之间，以及 lorasmith 与 PEFT 之间。原因一列是程序的英文消息。

{counts}

## 各个系列

{rows}
"""
WORDS = {
    "families.md": (ENGLISH, ["dtype", "family", "difference", "reason"]),
    "families.zh.md": (CHINESE, ["dtype", "系列", "差异", "原因"]),
}


def write(folder: Path, found: Mapping[str, Mapping[str, Any]], versions: Mapping[str, str]) -> None:
    """Write the page in both languages."""
    counts = {dtype: Counter(one[dtype]["verdict"] for one in found.values()) for dtype in DTYPES}
    shown = [verdict for verdict in VERDICTS if any(count[verdict] for count in counts.values())]
    for name, (text, (dtype, family, difference, reason)) in WORDS.items():
        sums = _table([dtype, *shown], [[d, *(str(counts[d][verdict]) for verdict in shown)] for d in DTYPES])
        rows = _table([family, *DTYPES, "PEFT", difference, reason], [_line(f, one) for f, one in found.items()])
        page = text.format(count=len(found), counts=sums, rows=rows, **versions)
        (folder / name).write_text(page.rstrip() + "\n", "utf-8")


def _line(family: str, one: Mapping[str, Any]) -> list[str]:
    first = one[DTYPES[0]]
    gradients = [first["differences"].get(f"{stage} gradient") for stage in ("batch", "peft")]
    largest = max((value for value in gradients if value is not None), default=None)
    return [family, *(one[dtype]["verdict"] for dtype in DTYPES), first["peft"].partition(" ")[0] or "-",
            "-" if largest is None else f"{largest:.0e}", _reasons(one)]  # fmt: skip


def _reasons(one: Mapping[str, Any]) -> str:
    """Why a family is not packed, and what does not work; said once if both dtypes have it."""
    texts = dict.fromkeys(text for dtype in DTYPES for text in _texts(one[dtype]))
    return "<br>".join(shortened(text) for text in texts)


def _texts(outcome: Mapping[str, Any]) -> list[str]:
    problems = [f"{stage}: {text}" for stage, text in outcome["problems"].items() if text != outcome["why"]]
    left_out = [t for t in outcome["said"] if "no adapter" in t or t == RANDOM or t.startswith(REPEATED)]
    peft = outcome["peft"] if outcome["peft"] not in ("", "equal") else ""
    return [text for text in (outcome["why"], *problems, *left_out, f"PEFT {peft}" if peft else "") if text]


def shortened(text: str) -> str:
    """A message without the paths of this machine, at most 240 characters, as a cell of a table."""
    text = re.sub(r"\S*/lorasmith-parity-[^/\s]+/(?:\d/)?(\S+?)(: |\s|$)", r"\1\2", text)
    text = re.sub(r"^model: ", "", text).removeprefix("!").replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 240 else text[:239] + "…"


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))
