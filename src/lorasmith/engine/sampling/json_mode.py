"""JSON mode: restricts sampling to tokens with which the reply is one JSON object, and ends it with the closing brace.

Uses the package llguidance (Rust, MIT), which computes the allowed tokens in well under a millisecond.
"""

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorasmith.errors import ConfigError, MissingExtraError
from lorasmith.i18n import _

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Whitespace and numbers are bounded, because small models would generate them endlessly. The grammar that llguidance
# makes from a JSON schema cannot bound whitespace (its issues 240, 247).
GRAMMAR = r"""
start: object
object: "{" (_ws? pair (_ws? "," _ws? pair)*)? _ws? "}"
array: "[" (_ws? value (_ws? "," _ws? value)*)? _ws? "]"
pair: STRING _ws? ":" _ws? value
value: object | array | STRING | NUMBER | "true" | "false" | "null"
_ws: WS
WS: /[ ]|\n[ \t]{0,20}/
STRING: /"([^"\\\x00-\x1f]|\\(["\\\/bfnrt]|u[0-9a-fA-F]{4}))*"/
NUMBER: /-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,16})?([eE][+\-]?[0-9]{1,3})?/
"""
TEST_JSON = '{"a": [-1.5e+20, true, false, null], "\\u00e9": {}}'  # a tokenizer must encode it without loss


class JsonObject:
    """The state of JSON mode in one reply.

    Raises MissingExtraError if llguidance is not installed, ConfigError if the tokenizer cannot represent all JSON.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._matcher = _matcher_of(tokenizer).deep_copy()

    def restrict(self, logits_V: Tensor) -> None:
        """Set the logits of forbidden tokens to -inf in place, including those beyond the tokenizer's vocabulary."""
        bias = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)  # 0 for forbidden tokens
        forbidden = torch.from_numpy(bias == 0).to(logits_V.device)
        own = min(len(forbidden), len(logits_V))
        logits_V[:own].masked_fill_(forbidden[:own], -torch.inf)
        logits_V[own:] = -torch.inf

    def push(self, token: int) -> bool:
        """Advance by the sampled token; returns whether the object is complete."""
        taken = self._matcher.consume_token(token)
        assert taken, self._matcher.get_error()
        return bool(self._matcher.is_accepting())


_matchers: WeakKeyDictionary[PreTrainedTokenizerBase, "LLMatcher"] = WeakKeyDictionary()


def _matcher_of(tokenizer: PreTrainedTokenizerBase) -> "LLMatcher":
    """A matcher at the beginning of a text. Cached for each tokenizer, because building it takes about a second."""
    if tokenizer not in _matchers:
        _matchers[tokenizer] = _build_matcher(tokenizer)
    return _matchers[tokenizer]


def _build_matcher(tokenizer: PreTrainedTokenizerBase) -> "LLMatcher":
    try:
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        text = _(
            "sampling.json_object: this requires the package llguidance. Install it with: pip install "
            "'lorasmith[serve]'"
        )
        raise MissingExtraError(text) from error
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        words = from_tokenizer(tokenizer)
        if words.decode_str(words.tokenize_str(TEST_JSON)) == TEST_JSON:
            return LLMatcher(words, LLMatcher.grammar_from_lark(GRAMMAR), log_level=0)
    raise ConfigError(
        _("sampling.json_object: this model's tokenizer cannot represent every JSON text. Turn the option off.")
    )
