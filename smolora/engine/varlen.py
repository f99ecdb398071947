"""Sequences of unequal lengths as blocks of equal length, so that a pass is one batched product over blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """Tokens cut into N equal blocks of L tokens, each of one sequence: (B, S) itself, or a packed batch laid anew."""

    number: int  # N
    length: int  # L
    seq: Tensor | None = None  # (N,) the sequence of a block; None: block = sequence
    count: Tensor | None = None  # (n,) blocks of a sequence, which lie together
    token: Tensor | None = None  # (N * L,) the token at a place, T for an empty place; None: the token itself
    place: Tensor | None = None  # (T,) the place of a token

    def split(self, tokens: Tensor) -> Tensor:
        """(T, ...) -> (N, L, ...), zero where a block has no token."""
        if self.token is not None:
            tokens = torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])]).index_select(0, self.token)
        return tokens.reshape(self.number, self.length, *tokens.shape[1:])

    def join(self, blocks: Tensor) -> Tensor:
        """(N, L, ...) -> (T, ...)."""
        tokens = blocks.reshape(self.number * self.length, *blocks.shape[2:])
        return tokens if self.place is None else tokens.index_select(0, self.place)

    def spread(self, per_seq: Tensor | None) -> Tensor | None:
        """(n, ...) -> (N, ...), each block's sequence; None stays None."""
        return per_seq if self.seq is None or per_seq is None else per_seq.index_select(0, self.seq)

    def gather(self, per_block: Tensor) -> Tensor:
        """(N, ...) -> (n, ...), summed over the blocks of a sequence, in their order."""
        if self.count is None:
            return per_block
        flat = torch.segment_reduce(per_block.flatten(1), "sum", lengths=self.count, axis=0, unsafe=True, initial=0)
        return flat.reshape(-1, *per_block.shape[1:])


def cut(tokens: int, num_seqs: int, cu_seqlens: Tensor | None) -> Blocks:
    """Cut a batch into blocks: `num_seqs` of equal length, or packed ones with boundaries `cu_seqlens` (n + 1,)."""
    if cu_seqlens is None or not num_seqs:
        return Blocks(num_seqs, tokens // max(num_seqs, 1))
    cu = cu_seqlens.long()
    length = 16
    while length < 256 and length * num_seqs < tokens:
        length *= 2
    lengths = cu[1:] - cu[:-1]
    count = (lengths + length - 1) // length
    ends = count.cumsum(0)
    number = tokens // length + num_seqs  # an upper bound that no value on the device is needed for
    block = torch.arange(number, device=cu.device)
    seq = torch.searchsorted(ends, block, right=True).clamp_(max=num_seqs - 1)
    start = cu[:-1].index_select(0, seq) + (block - (ends - count)[seq]) * length
    token = start[:, None] + torch.arange(length, device=cu.device)
    inside = (token < cu[1:].index_select(0, seq)[:, None]) & (block < ends[-1])[:, None]
    token = torch.where(inside, token, tokens).view(-1)
    place = torch.empty(tokens + 1, dtype=torch.long, device=cu.device)
    place[token] = torch.arange(number * length, device=cu.device)
    return Blocks(number, length, seq, count, token, place[:tokens])


def whole(tokens: int) -> Blocks:
    """Take all tokens as one block, where every sequence is treated alike."""
    return Blocks(1, tokens)


def laid(tokens: int, num_seqs: int, cu_seqlens: Tensor | None, common: bool) -> Blocks:
    """Lay out a product: in blocks by sequence, or in one block where the sequences have `common` factors."""
    return whole(tokens) if common else cut(tokens, num_seqs, cu_seqlens)
