"""The paper's vision transformer as slow loops, one image at a time, in float64 (arXiv 2210.09461, section 3).

In each block, after its attention: a tie from each token of one alternating set to the most similar of the other, by
the cosine of the keys' mean over the heads; the r best ties merge, as means weighted by size. In attention log(size)
is added to the logits of each key. Class and distillation tokens never merge; further prefix tokens stand aside.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ties(keys: list[Tensor], r: int, prefix: int) -> list[list[int]]:
    """Which tokens [d] become one: a list of groups in the order of the merged tokens."""
    aside = prefix - 1 if prefix > 2 else 0
    keys, prefix = keys[aside:], prefix - aside
    unit = [key / key.norm() for key in keys]
    found = []
    for i in range(0, len(unit), 2):
        if prefix >= 1 and i == 0:
            continue
        others = range(3 if prefix == 2 else 1, len(unit), 2)  # the distillation token is 1
        found.append(max((float(unit[i] @ unit[j]), j, i) for j in others))
    found.sort(key=lambda tie: -tie[0])
    groups = {j: [j] for j in range(1, len(unit), 2)}
    for _, j, i in found[:r]:
        groups[j].append(i)
    stay = [i for _, _, i in found[r:]]
    if prefix >= 1:  # the class token first, the others in their order
        stay = [0, *sorted(stay)]
    order = [[i] for i in stay]
    if prefix == 2:
        order = [order[0], groups.pop(1), *order[1:]]
    order += list(groups.values())
    return [[i] for i in range(aside)] + [[i + aside for i in group] for group in order]


def run_blocks(blocks, tokens: Tensor, rs: list[int], prefix: int, proportional: bool, parts, turn=None) -> tuple:
    """One image's tokens [N, C] through the blocks.

    turn(x [H, N, d], members): queries or keys turned by the places of the first tokens that each stands for, or None.
    parts(block): the functions (attention's q, k, v [H, N, d] from tokens, its projection, the MLP's branch).
    Returns the tokens [M, C], for each the list of first tokens in it, and the count in each block's MLP.
    """
    x, members, counts = list(tokens), [[i] for i in range(len(tokens))], []
    for block, r in zip(blocks, rs, strict=True):
        qkv, project, branch = parts(block)
        q, k, v = qkv(torch.stack(x)[None])  # (H, N, d)
        if turn is not None:
            q, k = turn(q, members), turn(k, members)
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if proportional:
            logits = logits + torch.tensor([len(group) for group in members], dtype=logits.dtype).log()
        out = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)  # (N, C)
        x = [a + b for a, b in zip(x, project(out[None])[0], strict=True)]
        r = min(r, (len(x) - prefix) // 2)
        if r > 0:
            groups = ties(list(k.mean(0)), r, prefix)
            sizes = [len(group) for group in members]
            x = [sum(x[i] * sizes[i] for i in group) / sum(sizes[i] for i in group) for group in groups]
            members = [sorted(m for i in group for m in members[i]) for group in groups]
        counts.append(len(x))
        x = [a + b for a, b in zip(x, branch(torch.stack(x)[None])[0], strict=True)]
    return torch.stack(x), members, counts


def spread(x: Tensor, members: list[list[int]]) -> Tensor:
    """Merged tokens [M, C] back to [N, C]."""
    out = x.new_empty(sum(map(len, members)), x.shape[1])
    for row, group in zip(x, members, strict=True):
        out[group] = row
    return out
