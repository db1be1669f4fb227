"""What prompts began with before: keys and values kept in blocks, found by what the tokens and the adapter are.

    N = blocks, H = key heads, D = head size

A block's name is the hash of all tokens up to its end and of the adapter's content, so that an adapter that was trained
on, renamed or loaded anew never sees another's blocks. The least recently used blocks make room.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from lorasmith.engine.kv_cache import KVCache

BLOCK = 8  # tokens: what templates begin with ends somewhere


class PrefixCache:
    """At most `tokens` tokens of prompts, in tensors [N, H, BLOCK, D] for each layer, which grow as they are needed."""

    def __init__(self, tokens: int) -> None:
        self.limit = tokens // BLOCK
        self._at: OrderedDict[bytes, int] = OrderedDict()  # a block's name -> its place; the least recently used first
        self._stores: dict[tuple[int, int], Tensor] = {}

    @property
    def blocks(self) -> int:
        """How many are held."""
        return len(self._at)

    def load(self, version: Hashable, ids: Sequence[int], cache: KVCache, slot: int) -> int:
        """Copy what is known of the beginning of `ids` into its region of the cache; how many tokens that is.

        The last token is never among them: its logits are wanted.
        """
        found: list[int] = []
        for name in _block_hashes(version, ids[:-1]):
            if name not in self._at:
                break
            self._at.move_to_end(name)
            found.append(self._at[name])
        if found:
            at_N = torch.tensor(found)
            for key, tensor in cache.tensors(slot):
                blocks = self._stores[key].index_select(0, at_N.to(tensor.device))
                _blocks_of(tensor, len(found)).copy_(blocks)
        return len(found) * BLOCK

    def save(self, version: Hashable, ids: Sequence[int], cache: KVCache, slot: int) -> None:
        """Keep the whole blocks of a prompt whose keys and values stand in the cache."""
        names = list(_block_hashes(version, ids))[: self.limit]
        new = [i for i, name in enumerate(names) if name not in self._at]
        for name in names:  # first, so that none of them makes room for another
            if name in self._at:
                self._at.move_to_end(name)
        for i in new:
            self._at[names[i]] = self._place()
        if not new:
            return
        at_N = torch.tensor([self._at[names[i]] for i in new])
        try:
            for key, tensor in cache.tensors(slot):
                blocks = _blocks_of(tensor, len(names))
                store = self._room(key, blocks)
                store.index_copy_(0, at_N.to(tensor.device), blocks[new])
        except BaseException:  # an interrupt too: a name whose block was not copied means another's
            self._at.clear()
            raise

    def _place(self) -> int:
        if len(self._at) < self.limit:
            return len(self._at)
        _name, place = self._at.popitem(last=False)
        return place

    def _room(self, key: tuple[int, int], like: Tensor) -> Tensor:
        before = self._stores.get(key)
        needed = 1 + max(self._at.values())
        if before is None or len(before) < needed:
            size = min(self.limit, max(needed, 2 * (0 if before is None else len(before))))
            store = like.new_empty(size, *like.shape[1:])
            if before is not None:
                store[: len(before)] = before
            self._stores[key] = store
        return self._stores[key]


def _block_hashes(version: Hashable, ids: Sequence[int]) -> Iterator[bytes]:
    """The name of each whole block of `ids`."""
    name = repr(version).encode()
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        name = hashlib.blake2b(name + repr(ids[start : start + BLOCK]).encode(), digest_size=16).digest()
        yield name


def _blocks_of(tensor: Tensor, number: int) -> Tensor:
    """The first blocks [number, H, BLOCK, D] of a request's region in a cache [H, C, D]: a view."""
    blocks: Tensor = tensor[:, : number * BLOCK].unflatten(1, (number, BLOCK))
    return blocks.transpose(0, 1)
