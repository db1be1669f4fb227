"""Prefix caching: reuses the keys and values of earlier prompts that begin with the same tokens.

    N = blocks, H = key heads, D = head size

A block is identified by a hash of all tokens up to its end and of the adapter's version, so that an adapter that was
trained further, renamed or reloaded never uses stale blocks. The least recently used blocks are evicted.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from lorasmith.engine.kv_cache import KVCache

BLOCK = 8  # tokens per block: small, because the prefix that chat templates share is short


class PrefixCache:
    """Holds blocks of up to `tokens` tokens in total, in tensors [N, H, BLOCK, D] per layer that grow on demand."""

    def __init__(self, tokens: int) -> None:
        self.limit = tokens // BLOCK
        self._at: OrderedDict[bytes, int] = OrderedDict()  # block hash -> place, least recently used first
        self._stores: dict[tuple[int, int], Tensor] = {}

    @property
    def blocks(self) -> int:
        """Number of cached blocks."""
        return len(self._at)

    def load(self, version: Hashable, ids: Sequence[int], cache: KVCache, slot: int, active_from: int = 0) -> int:
        """Copy the cached prefix of `ids` into the region of `slot`; returns its number of tokens.

        The last token is never included, because its logits are needed. active_from: the position before which the
        tokens are computed by the base model, with whose requests they are shared.
        """
        places: list[int] = []
        for name in _block_hashes(version, ids[:-1], active_from):
            if name not in self._at:
                break
            self._at.move_to_end(name)
            places.append(self._at[name])
        if places:
            at_N = torch.tensor(places)
            for key, tensor in cache.tensors(slot):
                blocks = self._stores[key].index_select(0, at_N.to(tensor.device))
                _blocks_of(tensor, len(places)).copy_(blocks)
        return len(places) * BLOCK

    def save(self, version: Hashable, ids: Sequence[int], cache: KVCache, slot: int, active_from: int = 0) -> None:
        """Store the full blocks of a prompt whose keys and values are in the region of `slot`."""
        names = list(_block_hashes(version, ids, active_from))[: self.limit]
        new = [i for i, name in enumerate(names) if name not in self._at]
        for name in names:  # before adding, so that these are not evicted for one another
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
        except BaseException:  # KeyboardInterrupt too: a hash without its data would refer to another block's data
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


def _block_hashes(version: Hashable, ids: Sequence[int], active_from: int) -> Iterator[bytes]:
    """The hash of each full block of `ids`, each including all tokens before it.

    Blocks that end before `active_from` have the names of the base model's, and the next one the adapter's version.
    """
    name, own = repr(None if active_from >= BLOCK else version).encode(), active_from < BLOCK
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        if not own and start + BLOCK > active_from:
            name, own = name + repr(version).encode(), True
        name = hashlib.blake2b(name + repr(ids[start : start + BLOCK]).encode(), digest_size=16).digest()
        yield name


def _blocks_of(tensor: Tensor, number: int) -> Tensor:
    """A view [number, H, BLOCK, D] of the first blocks of a region [H, C, D]."""
    blocks: Tensor = tensor[:, : number * BLOCK].unflatten(1, (number, BLOCK))
    return blocks.transpose(0, 1)
