"""Compare a loaded tokenizer with the tokenizer.json of its folder, and read the file itself if they differ.

transformers 5 takes only the vocabulary from tokenizer.json for many models, and how text is split from a class that it
chooses by model_type and tokenizer_class. Where class and file disagree, the model gets other token ids than in its
pretraining, without any message (huggingface/transformers#45488, #45812, #45920).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Sequence as SequenceDecoder
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorasmith.config.files import read_object
from lorasmith.errors import ModelError
from lorasmith.i18n import _
from lorasmith.report import Report

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_WORDS = """
7 42 2024 1234567 3.14159 1,000,000 0x1F 1e-9 50% $19.99 12:30:45 192.168.0.1 a1b22c333
Hello HELLO helloWorld co-operate don't I'll 'quoted' "quoted" o’clock
naïve CAFÉ straße œuvre Łódź İstanbul ﬁne Ω Å e\u0301 n\u0303o \u1e9b\u0323 x² ™ ﷺ ｆｕｌｌ１２３
你好 我爱北京天安门 第2024年3月 中文English混合 ，。！？ 「引号」 ㈱ 繁體字 カタカナ ﾊﾝｶｸ 안녕하세요
привет γειά שלום ١٢٣ नमस्ते १२३ สวัสดี ქართული አማርኛ
🙂 😀😀 👍🏽 👩‍👩‍👧 🇩🇪 ❤️ ∀x∈ℝ ½¼
. , ; ? !!! ?! ... -- — __ ** ## // \\ && @ => <- {} [] ([{}]) ```
f(x) x+=1; a[0][1] !=null </div> &amp; #include /usr/local/bin C:\\dir https://a.b/c?d=1&e=%20#f
{'a':[1,2]} f"{x}" x**2 std::vector<int> ${x}
<s> </s> <unk> <bos> <mask> [CLS] [INST] <|endoftext|> <|im_start|> <think> <0x0A> ▁ ▁a Ġ Ċ ##ing
"""
TEXTS = (
    *_WORDS.split(),
    "", " ", "  ", "   ", "        ", "\t", "\t\t", " \t ", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\r", " \n",
    "\n ", " \n \n", "\xa0", "\u3000", "\u200b", "\ufeff", "\u2028", "\x00", " a", "a ", " a ", "  a", "a  b",
    "a   b    c", "a\tb", "a\xa0b", "a\u200bb", "a\u3000b", "a\nb", "a\n\nb", "a\r\nb", "a \n b", "a.\n", "a.\n\n",
    "!\n\n", "?!\n", "...\n\n\n", ")\n", "};\n}\n", "。\n", "，\n\n", ":\n\n- a\n- b", "\n!", " .", " !\n",
    "Hello, world! How are you?",
    "The year 2024 has 366 days, 8784 hours.",
    "I'm sure we'll see what they've done, won't we?",
    "Dr. Smith paid $1,234.56 on 12/31/2023.",
    "price: 100€ / 12.5 % = 8",
    "考试有哪些技巧？ 先做会做的题，再检查一遍。\n早睡早起身体好。",
    "我有3个苹果和12个梨,共15个。",
    "中文 and English, 混合 text。",
    "これは日本語の文章です。2024年。",
    "Это предложение на русском языке.",
    "هذه جملة باللغة العربية.",
    "यह हिंदी का वाक्य है।",
    "이것은 한국어 문장입니다.",
    "def f(x):\n    return x ** 2  # comment\n",
    "for (int i = 0; i < 10; i++) {\n\tsum += a[i];\n}\n",
    "{\"name\": \"a\", \"values\": [1, 2.5, null]}\n",
    "SELECT * FROM t WHERE id = 42;",
    "$ pip install 'a[b]' && echo \"done\"",
    "# Title\n\n* item 1\n* item 2\n\n```python\nx = 1\n```\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "$$\\int_0^1 x^2 \\, dx = \\frac{1}{3}$$",
    "🙂 Thanks! 👍🏽\n\n🎉🎉",
    "naïve café — “quoted” ‘text’…",
    "e\u0301 and é, ﬁ and fi, Ａ and A",
    "hello</s>hello <s> hello",
    "<|im_start|>user\nHi<|im_end|>\n",
    "[INST] Hi [/INST] Hello </s>",
    "AbCdEfG XMLHttpRequest iPhone15Pro v2.0.1-rc1",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "10000000000000000000000000000000",
    "                                x",
)  # fmt: skip
_CLASS = '''"""For AutoTokenizer, which would use a class with other token ids for this type of model."""

from transformers import PreTrainedTokenizerFast


class TokenizerJson(PreTrainedTokenizerFast):
    """The tokenizer in tokenizer.json."""
'''
_SAMPLE = 200  # places in the vocabulary and in the merges where the file is compared with the loaded tokenizer
_VOCABULARY, _MERGES = re.compile(rb'"vocab"\s*:\s*\{'), re.compile(rb'"merges"\s*:\s*\[')
_TOKEN = re.compile(rb'[{,]\s*("(?:[^"\\]|\\.)+")\s*:\s*(\d+)\s*[,}]')
_MERGE = re.compile(
    rb'[\[,]\s*("(?:[^"\\ ]|\\.)+ (?:[^"\\ ]|\\.)+"|\[\s*"(?:[^"\\]|\\.)+",\s*"(?:[^"\\]|\\.)+"\s*\])\s*[,\]]'
)
_OPTIONS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)
_SETTINGS = (
    "model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces",
    "split_special_tokens",
)  # fmt: skip


def as_in_file(
    folder: Path, tokenizer: PreTrainedTokenizerBase, report: Report | None = None
) -> PreTrainedTokenizerBase:
    """`tokenizer`, which transformers made for `folder`, or one with the ids of tokenizer.json if its own differ.

    The latter has all special tokens, settings and chat templates of the former, except for tokens that neither the
    file nor a config of the folder contains. A folder without tokenizer.json leaves nothing to compare.

    Raises ModelError if the ids differ, and the tokenizer is Python code of the model.
    """
    path = folder / TOKENIZER
    if not path.is_file() or is_built_like(path, tokenizer):
        return tokenizer
    plain = _from_file(folder, tokenizer)
    different = first_difference(tokenizer, plain)
    if different is None:
        return tokenizer
    values: dict[str, Any] = {"file": path, "name": type(tokenizer).__name__}
    values |= zip(("sample", "found", "wanted"), map(repr, different), strict=True)
    if not type(tokenizer).__module__.startswith("transformers."):
        raise ModelError(
            _(
                "{file}: the tokenizer that comes with the model as Python code ({name}) does not agree with it: it "
                "splits {sample} into {found} instead of {wanted}. Remove the one that the model was not trained with.",
                **values,
            )
        )
    (report or Report()).warn(
        _(
            "{file}: {name}, which transformers {version} uses for this model, splits {sample} into {found} instead of "
            "{wanted}. The token ids of the file are used here. Other programs that load the model with transformers "
            "may use the wrong ones.",
            version=transformers.__version__,
            **values,
        )
    )
    return plain


def is_built_like(path: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `tokenizer` does what the file at `path` says: all parts are equal, and a sample of the vocabulary is.

    Only for BPE, and the order of keys in which the package tokenizers writes; otherwise False. Does not read the
    vocabulary as a whole, which would take as long as loading the tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = path.read_bytes()
    if not isinstance(backend, Tokenizer) or (parts := _without_vocabulary(data)) is None:
        return False
    declared = {added["id"]: _flags(AddedToken(**_without_id(added))) for added in parts["added_tokens"]}
    if declared != {i: _flags(added) for i, added in backend.get_added_tokens_decoder().items()}:
        return False
    file = Tokenizer.from_str(json.dumps(parts | {"added_tokens": [], "truncation": None, "padding": None}))
    if file.encode("").ids != tokenizer("")["input_ids"] or type(file.model) is not type(backend.model):
        return False
    names = ("normalizer", "pre_tokenizer", "decoder")
    if any(_state(getattr(file, name)) != _state(getattr(backend, name)) for name in names):
        return False
    if any((getattr(file.model, name) or None) != (getattr(backend.model, name) or None) for name in _OPTIONS):
        return False
    return _has_sample(backend, data)


def first_difference(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> tuple[str, list[str], list[str]] | None:
    """The first text that the two encode as other ids, and the tokens of each; None if there is none.

    Compares the built-in texts and every added token, with the special tokens that the tokenizer adds to a text and
    without, and what the ids are decoded to.
    """
    added = {token.content for each in (tokenizer, other) for token in each.added_tokens_decoder.values()}
    texts = [*TEXTS, *(f"a {token} b{token}" for token in sorted(added))]
    for adds, compared in ((False, texts), (True, ["a"])):
        mine, theirs = (
            each(compared, add_special_tokens=adds, verbose=False)["input_ids"] for each in (tokenizer, other)
        )
        for text, found, wanted in zip(compared, mine, theirs, strict=True):
            if found != wanted:
                return text, _tokens(tokenizer, found), _tokens(other, wanted)
            if (mine_back := str(tokenizer.decode(found))) != (theirs_back := str(other.decode(wanted))):
                return text, [mine_back], [theirs_back]
    return None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into a model folder, so that AutoTokenizer reads it with the same token ids.

    For some values of model_type, such as qwen2, AutoTokenizer ignores the class that tokenizer_config.json names. If
    its own choice gives other ids, the folder also gets a class that reads tokenizer.json: AutoTokenizer then uses it,
    or, without trust_remote_code, the class that tokenizer_config.json names.
    """
    tokenizer.save_pretrained(folder)
    if type(tokenizer) is not PreTrainedTokenizerFast or not (folder / "config.json").is_file():
        return
    chosen = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if first_difference(chosen, tokenizer) is None:
        return
    config = read_object(folder / TOKENIZER_CONFIG, ModelError)
    config["auto_map"] = {"AutoTokenizer": [None, "read_tokenizer_json.TokenizerJson"]}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (folder / "read_tokenizer_json.py").write_text(_CLASS, "utf-8")


def _from_file(folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer.json of `folder` as it is, with the settings and special tokens of `tokenizer`."""
    settings = {name: getattr(tokenizer, name) for name in _SETTINGS}
    plain: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, **settings)
    backend = plain.backend_tokenizer
    if (config := folder / TOKENIZER_CONFIG).is_file():
        _set_prefix_space(backend, read_object(config, ModelError).get("add_prefix_space"))
    defaults: dict[str, Any] = {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if getattr(plain, name, None) is None and backend.token_to_id(str(token)) is not None
    }
    if defaults:  # that no config names, only the class
        plain.add_special_tokens(defaults)
    return plain


def _set_prefix_space(backend: Tokenizer, wanted: object) -> None:
    """Apply the key add_prefix_space of tokenizer_config.json, of which tokenizer.json knows nothing."""
    part = backend.pre_tokenizer
    if not isinstance(wanted, bool):
        return
    if isinstance(part, ByteLevel):
        part.add_prefix_space = wanted
    elif isinstance(part, Metaspace) and (part.prepend_scheme != "never") != wanted:
        part.prepend_scheme = "first" if wanted else "never"
        if not wanted and isinstance(decoder := backend.decoder, SequenceDecoder):
            steps = json.loads(decoder.__getstate__())["decoders"]
            kept = [step for step in steps if step["type"] != "Strip"]  # it removes the space
            decoder.__setstate__(json.dumps({"type": "Sequence", "decoders": kept}).encode())
            backend.decoder = decoder


def _without_vocabulary(data: bytes) -> dict[str, Any] | None:
    """The parts of a tokenizer.json with an empty vocabulary; None unless it is of BPE, in the usual order of keys."""
    at = _VOCABULARY.search(data)
    try:
        parts = json.loads(data[: at.start()] + b'"vocab": {}, "merges": []}}') if at else {}
    except ValueError:
        return None
    needed = {"added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"}
    return parts if needed <= parts.keys() and parts["model"].get("type") == "BPE" else None


def _has_sample(backend: Tokenizer, data: bytes) -> bool:
    """Whether some tokens of the file have the same ids in `backend`, and some merges make one token of two."""
    vocabulary, merges = _VOCABULARY.search(data), _MERGES.search(data)
    if vocabulary is None or merges is None:
        return False
    try:
        tokens = {json.loads(t): int(i) for t, i in _samples(_TOKEN, data, vocabulary.start(), merges.start())}
        pairs = [json.loads(pair) for (pair,) in _samples(_MERGE, data, merges.start(), len(data))]
    except ValueError:  # what was found between two quotes is no string
        return False
    texts = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
    has_tokens = bool(tokens) and all(backend.model.token_to_id(token) == i for token, i in tokens.items())
    has_merges = bool(texts) and all([t.value for t in backend.model.tokenize(text)] == [text] for text in texts)
    return has_tokens and has_merges


def _samples(pattern: re.Pattern[bytes], data: bytes, start: int, end: int) -> Iterator[tuple[bytes, ...]]:
    """The groups of `pattern` at places spread evenly over the bytes from `start` to `end`."""
    for at in range(start, end, max(1, (end - start) // _SAMPLE)):
        if found := pattern.search(data, at, min(at + 1000, end)):
            yield found.groups()


def _state(part: Any) -> bytes:
    """A part of a tokenizer as JSON, without what affects only offsets."""
    state: bytes = b"" if part is None else part.__getstate__()
    return re.sub(rb'"trim_offsets":(true|false),?', b"", state)


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]


def _flags(token: AddedToken) -> tuple[object, ...]:
    return token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special


def _without_id(added: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in added.items() if key != "id"}


def misnumbered_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A warning about added tokens with another id than the files of the folder say; empty if there are none.

    The package tokenizers numbers added tokens anew where their ids are taken, leave a gap, or one text has two.
    """
    for path, pairs in _listed_tokens(folder):
        for token, listed_id in pairs:
            if (actual := tokenizer.convert_tokens_to_ids(token)) != listed_id:
                return _(
                    "{file}: lists the token {token} with the id {listed}, but the tokenizer gives it the id {actual}, "
                    "because the id is taken, leaves a gap, or the same text has another one. If the model was "
                    "trained with the listed id, it does not know the token; give every added token one id, without "
                    "gaps.",
                    file=path,
                    token=repr(token),
                    listed=listed_id,
                    actual=actual,
                )
    return ""


def _listed_tokens(folder: Path) -> Iterator[tuple[Path, list[tuple[str, int]]]]:
    """The files of a folder that list added tokens, each with their texts and ids."""
    path = folder / TOKENIZER
    if path.is_file():
        data = path.read_bytes()
        if at := re.search(rb'"added_tokens"\s*:\s*(?=\[)', data):
            end = _VOCABULARY.search(data, at.end())
            text = data[at.end() : end.start() if end else None].decode("utf-8")
            yield path, [(token["content"], token["id"]) for token in json.JSONDecoder().raw_decode(text)[0]]
    path = folder / TOKENIZER_CONFIG
    if path.is_file():
        config = read_object(path, ModelError)
        yield path, [(token["content"], int(i)) for i, token in config.get("added_tokens_decoder", {}).items()]
