"""Constrained decoding: restricts sampling to tokens with which the reply follows a grammar, such as a JSON object.

Uses the package llguidance (Rust, MIT), which computes the allowed tokens in well under a millisecond. Grammars are
written in its variant of Lark: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorasmith.errors import ConfigError, MissingExtraError
from lorasmith.i18n import _

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Whitespace is bounded, because small models would generate it endlessly.
WHITESPACE = r"[ ]|\n[ \t]{0,20}"
JSON_RULES = rf"""
object: "{{" (_ws? pair (_ws? "," _ws? pair)*)? _ws? "}}"
array: "[" (_ws? value (_ws? "," _ws? value)*)? _ws? "]"
pair: STRING _ws? ":" _ws? value
value: object | array | STRING | NUMBER | "true" | "false" | "null"
_ws: WS
WS: /{WHITESPACE}/
STRING: /"([^"\\\x00-\x1f]|\\(["\\\/bfnrt]|u[0-9a-fA-F]{{4}}))*"/
NUMBER: /-?(0|[1-9][0-9]{{0,15}})(\.[0-9]{{1,16}})?([eE][+\-]?[0-9]{{1,3}})?/
"""
TEST_JSON = '{"a": [-1.5e+20, true, false, null], "\\u00e9": {}}'  # a tokenizer must encode it without loss


class Grammar:
    """A compiled grammar. `rules` begin with the rule `start`.

    Raises MissingExtraError if llguidance is not installed, ConfigError if the rules cannot be compiled or the
    tokenizer cannot represent all JSON.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: str) -> None:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            text = _(
                "restricting replies to JSON requires the package llguidance. Install it with: pip install "
                "'lorasmith[serve]'"
            )
            raise MissingExtraError(text) from error
        words = _words_of(tokenizer)
        self.matcher: LLMatcher = LLMatcher(words, LLMatcher.grammar_from_lark(rules), log_level=0)
        if self.matcher.is_error():
            raise ConfigError(self.matcher.get_error().strip().splitlines()[0])

    @classmethod
    def json_object(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        """That of any JSON object."""
        return cls(tokenizer, "start: object" + JSON_RULES)


class Derivation:
    """How far one reply has come in a grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self._matcher = grammar.matcher.deep_copy()

    @property
    def is_broken(self) -> bool:
        """Whether the grammar exceeded a limit of llguidance; it then restricts nothing, and the reply must end."""
        return bool(self._matcher.is_error())

    def restrict(self, logits_V: Tensor, stop_ids: Collection[int] = ()) -> None:
        """Set the logits of forbidden tokens to -inf in place, including those beyond the tokenizer's vocabulary.

        stop_ids: tokens that end the reply; they are allowed where it may be complete.
        """
        bias = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)  # 0 for forbidden tokens
        if self.is_broken:
            return
        is_allowed_V = torch.zeros(len(logits_V), dtype=torch.bool)
        own = min(len(bias), len(logits_V))
        is_allowed_V[:own] = torch.from_numpy(bias[:own] != 0)
        is_allowed_V[[i for i in stop_ids if i < len(logits_V)]] = bool(self._matcher.is_accepting())
        logits_V.masked_fill_(~is_allowed_V.to(logits_V.device), -torch.inf)

    def push(self, token: int) -> bool:
        """Advance by the sampled token; returns whether the reply is complete, so that nothing can follow."""
        taken = self._matcher.consume_token(token)
        assert taken or self.is_broken, token
        return bool(self._matcher.is_stopped())


_known: WeakKeyDictionary[PreTrainedTokenizerBase, "LLTokenizer"] = WeakKeyDictionary()


def _words_of(tokenizer: PreTrainedTokenizerBase) -> "LLTokenizer":
    """The vocabulary as llguidance needs it. Cached for each tokenizer, because building it takes about a second."""
    if tokenizer not in _known:
        _known[tokenizer] = _build(tokenizer)
    return _known[tokenizer]


def _build(tokenizer: PreTrainedTokenizerBase) -> "LLTokenizer":
    from llguidance.hf import from_tokenizer

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        words = from_tokenizer(tokenizer)
        if words.decode_str(words.tokenize_str(TEST_JSON)) == TEST_JSON:
            return words
    raise ConfigError(
        _("this model's tokenizer cannot represent every JSON text, so its replies cannot be restricted to JSON.")
    )
