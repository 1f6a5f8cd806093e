"""Padding beside the image's tokens: what a model's mask hides from all of them.

Where the mask is one of whole keys, and says the same of all queries, hidden tokens are left out of the attention: no
mask is needed then, and what nobody attends to need not be computed. Rows of a batch that hide different tokens run
after each other. Elsewhere (Chroma, whose mask hides nothing but weighs; rows that differ, where tokens are matched)
the mask goes with the image tokens that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.sdpa import HostAttention
from ..attention.sequence import take_heads
from ..merging.plan import Plan

# attend(attention, q, k, v, start, plan): of all tokens [B, H, L, d], the image's from `start` on -> [B, H, L, d].
Attend = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of a batch that hide the same tokens. rows, kept: which rows, and which tokens stay, None for all; kept
    as an int: the first ones. start: where the image's begin among these."""

    rows: Tensor | None
    kept: Tensor | int | None
    start: int


def group_rows(mask: Tensor, head: int, image: int, tail: int, device: torch.device) -> tuple[Group, ...] | None:
    """The groups of a batch; None where a row's mask hides tokens of the image, or is none of ones and zeros.

    mask: [B, head + tail] on the CPU, of the tokens beside the image, or [B, head + image + tail].
    """
    valid = mask.bool()
    if mask.dim() != 2 or not torch.equal(valid.to(mask.dtype), mask):
        return None
    if valid.shape[1] == head + image + tail:
        before, of_image, after = valid.split((head, image, tail), dim=1)
        valid = torch.cat((before, after), dim=1)
        if not of_image.all():
            return None
    if valid.shape[1] != head + tail:
        return None
    patterns: dict[bytes, list[int]] = {}
    for number, row in enumerate(valid):
        patterns.setdefault(row.numpy().tobytes(), []).append(number)
    groups = []
    for rows in patterns.values():
        row = valid[rows[0]]
        before, after = row[:head], row[head:]
        kept = torch.cat((before, torch.ones(image, dtype=torch.bool), after)).nonzero()[:, 0]
        is_first = kept[-1] == len(kept) - 1
        keep = None if len(kept) == len(row) + image else len(kept) if is_first else kept.to(device)
        of = None if len(patterns) == 1 else torch.tensor(rows, device=device)
        groups.append(Group(of, keep, int(before.sum())))
    return tuple(groups)


class UnderMask(HostAttention):
    """The host's call with its mask, cut to the image's tokens that are left. The mask says the same of all of them."""

    NOT_ALONE = "a mask"
    is_torchs_alone = False
    cuts_mask = True

    def __init__(self, attention: HostAttention, start: int, image: int):
        super().__init__(attention.func, attention.options, attention.mask)
        self.start, self.image = start, image

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        mask = self._cut(self._cut(self.mask, -1, k.shape[2]), -2, q.shape[2])
        if bias is not None:
            if mask.dtype is torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
            mask = mask + bias[:, None, None].to(mask.dtype)
        return self.func(q, k, v, attn_mask=mask, **self.options)

    def _cut(self, mask: Tensor, dim: int, length: int) -> Tensor:
        goes = mask.shape[dim] - length
        if mask.shape[dim] == 1 or goes == 0:
            return mask
        end = self.start + self.image
        before, after = mask.narrow(dim, 0, end - goes), mask.narrow(dim, end, mask.shape[dim] - end)
        return torch.cat((before, after), dim)


def attend_padded(
    attend: Attend,
    groups: tuple[Group, ...],
    attention: HostAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    plan: Plan,
    splits: bool,
    tell_masked: Callable[[], None],
) -> Tensor:
    """attend under the host's mask, [B, H, L, d] -> [B, H, L, d].

    splits: whether rows may run after each other. tell_masked: called where the mask stays.
    """
    whole = attention.mask.dtype is torch.bool and attention.mask.shape[-2] == 1
    unmasked = HostAttention(attention.func, attention.options, None)
    if all(group.kept is None for group in groups):
        return attend(unmasked, q, k, v, start, plan)
    if not whole or (len(groups) > 1 and not splits):
        tell_masked()
        return attend(UnderMask(attention, start, plan.tokens), q, k, v, start, plan)
    out = torch.zeros_like(q)
    for group in groups:
        given = [_taken(x if group.rows is None else x[group.rows], group.kept) for x in (q, k, v)]
        made = attend(unmasked, *given, group.start, plan)
        if group.rows is None:
            _put(out, group.kept, made)
        else:
            rows = torch.zeros_like(out[group.rows])
            _put(rows, group.kept, made)
            out[group.rows] = rows
    return out


def _taken(x: Tensor, kept: Tensor | int | None) -> Tensor:
    """The tokens of x [B, H, L, d] that stay."""
    if kept is None:
        return x
    return x[:, :, :kept] if isinstance(kept, int) else take_heads(x, kept)


def _put(out: Tensor, kept: Tensor | int | None, made: Tensor) -> None:
    """Put what was made of the tokens that stay into out [B, H, L, d]."""
    if isinstance(kept, Tensor):
        out.index_copy_(2, kept, made)
    else:
        out[:, :, :kept] = made
