"""Each query keeps its own token among sampled keys, the specification.

A kernel's output o and the logarithm s of its sum of exponentials are all that is needed to put one more key in for
each query, and to let the token that stands for its run count once less:

    (exp(s) o + exp(q k_own) v_own - exp(q k_drawn) v_drawn) / (exp(s) + exp(q k_own) - exp(q k_drawn))

A query whose own token is the drawn one gets o, bit for bit. As all tokens' keys are there, each head draws for itself:
head h takes what layer and step would draw h turns later. Their errors differ then, and what comes behind them takes
the mean (docs/quality.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import spread_rows

# Scores that attend_drawn writes at a time.
_SCORES = 2**26


def by_head(index: Tensor, batch: int, heads: int) -> Tensor:
    """Lists [T, b, K] -> [batch, heads, K]: head h has the lists h % T, row i the list i % b."""
    index = index.repeat(-(-heads // index.shape[0]), 1, 1)[:heads]  # (H, b, K)
    return spread_rows(index.transpose(0, 1), batch)


def take_by_head(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of k and v [B, H, L, d] by index [T, b, K], head h by its lists h % T -> [B, H, K, d] twice."""
    return _take_by_head(k, index), _take_by_head(v, index)


def _take_by_head(x: Tensor, index: Tensor) -> Tensor:
    """The same of one."""
    return x.gather(2, by_head(index, *x.shape[:2])[..., None].expand(-1, -1, -1, x.shape[3]))


def image_of(x: Tensor, start: int, tokens: int) -> Tensor:
    """The image's part of x [B, H, L, ...]; x itself where there is nothing else, since each view takes the processor a
    few microseconds in each layer."""
    return x if x.shape[2] == tokens else x[:, :, start : start + tokens]


def add_self_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    head_draws: Tensor,
    runs: Tensor,
    scale: float,
    weight: float = 0.0,
) -> Tensor:
    """The attention with each query's own token among its keys.

    Args:
        q, k, v: [B, H, N, d] of all tokens. out: [B, H, N, d] and lse: [B, H, N], natural logarithm, of the attention
            to those that were drawn, each weighing as many as it stands for, and to whatever else shares the softmax.
        head_draws: [T, b, M] int64, the drawn tokens, in head h those of the list h % T. runs: [N] int64, the place in
            such a list of the one that stands for each token. scale: of the logits.
        weight: what lse lacks, where the attention was told of no weights.
    Returns:
        [B, H, N, d] in out's dtype.
    """
    owner = by_head(head_draws.index_select(2, runs), q.shape[0], q.shape[1])  # (B, H, N)
    stands = owner == torch.arange(q.shape[2], device=q.device)  # for itself; what cancels would leave its rounding
    # In passes over whole rows: a gather by an index that is the same for all channels takes a CPU ten times as long.
    drawn_k, drawn_v = (_take_by_head(x, head_draws).index_select(2, runs).float() for x in (k, v))
    q, lse = q.float(), lse.float() + weight
    own, drawn = (
        (torch.linalg.vecdot(q, x) * scale - lse).masked_fill(stands, -torch.inf) for x in (k.float(), drawn_k)
    )  # (B, H, N)
    top = own.clamp_min(0.0)  # the drawn one is among those that lse has summed
    rest, own, drawn = (x.exp() for x in (-top, own - top, drawn - top))
    total = rest + own - drawn
    mixed = out.float() * (rest / total)[..., None]
    mixed.addcmul_(v.float(), (own / total)[..., None]).addcmul_(drawn_v, (drawn / total)[..., None], value=-1.0)
    return mixed.to(out.dtype)


def attend_drawn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_draws: Tensor,
    runs: Tensor,
    start: int,
    scale: float,
    weight: float,
) -> Tensor:
    """The attention to drawn keys, to all tokens beside the image's, and of each of the image's queries to its own
    token.

    Args:
        q, k, v: [B, H, L, d] of all tokens; the image's N begin at `start`. head_draws, runs, scale: as in
            add_self_token.
        weight: the logarithm of what each drawn key counts; a key beside the image's counts once.
    Returns:
        [B, H, L, d].
    """
    image = slice(start, start + runs.shape[0])
    drawn = take_by_head(k[:, :, image], v[:, :, image], head_draws)
    beside = [[x[:, :, :start], x[:, :, image.stop :]] for x in (k, v)]
    keys, values = (torch.cat((x, *y), 2).float() for x, y in zip(drawn, beside, strict=True))
    count = torch.full((keys.shape[2],), 0.0, device=q.device)
    count[: head_draws.shape[2]] = weight
    out, lse = [], []
    for part in q.float().split(max(1, _SCORES // (q.shape[0] * q.shape[1] * keys.shape[2])), 2):
        logits = part @ keys.transpose(-1, -2) * scale + count
        out.append(logits.softmax(-1) @ values)
        lse.append(logits.logsumexp(-1))
    out, lse = torch.cat(out, 2), torch.cat(lse, 2)
    parts = (x[:, :, image] for x in (q, k, v, out, lse))
    out[:, :, image] = add_self_token(*parts, head_draws, runs, scale)
    return out.to(q.dtype)
