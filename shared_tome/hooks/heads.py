"""Proportional attention under an attention code that is not ours.

The bias of each key is added by more channels of each head (core/channels.py). The host's attention runs between to_q,
to_k, to_v and to_out, so hooks on these four widen and narrow the heads and the code in between (sdp, xformers,
sub-quadratic, Doggettx, diffusers' processors, ...) needs no change. These codes scale the logits in one of two ways:
by the layer's own `scale` or by the size of the heads they are given. Which one is found out by trying.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..attention.combine import TORCHS, choose_kernel
from ..attention.multires import NOT_MULTIRES
from ..attention.sdpa import AroundSdpa, HostAttention, is_torchs_sdpa
from ..attention.self_token import NO_LSE, NOT_KEPT
from ..config import ToMeConfig
from ..core.channels import KEY, QUERY, VALUE, extra_channels
from ..core.failures import is_out_of_memory

OWN, GIVEN = "own", "given"
PROJECTIONS = ("to_q", "to_k", "to_v")


def served_blocks(model: nn.Module, *more: str) -> Iterator[nn.Module]:
    """The transformer blocks whose self-attention `attn1` has its projections as modules of their own, and `more`."""
    names = *PROJECTIONS, "to_out", *more
    for module in model.modules():
        attn1 = getattr(module, "attn1", None)
        if isinstance(attn1, nn.Module) and all(map(hasattr, (attn1,) * len(names), names)):
            yield module


def stretch(d: int, rule: str) -> float:
    """What queries and biases are multiplied by, so that the logits come out right for heads of d channels."""
    return math.sqrt((d + extra_channels(d)) / d) if rule == GIVEN else 1.0


def widen_query(q: Tensor, heads: int, rule: str) -> Tensor:
    """q [B, N, H * d] -> [B, N, H * (d + p)]."""
    q = q.unflatten(-1, (heads, -1))  # (B, N, H, d)
    return kernels.extend_one(q * stretch(q.shape[-1], rule) if rule == GIVEN else q, QUERY).flatten(2)


def widen_key(k: Tensor, heads: int, rule: str, bias: Tensor) -> Tensor:
    """k [B, M, H * d] and bias [B, M] -> [B, M, H * (d + p)]."""
    k = k.unflatten(-1, (heads, -1))  # (B, M, H, d)
    return kernels.extend_one(k, KEY, bias[:, :, None] * stretch(k.shape[-1], rule)).flatten(2)


def widen_value(v: Tensor, heads: int) -> Tensor:
    """v [B, M, H * d] -> [B, M, H * (d + p)]."""
    return kernels.extend_one(v.unflatten(-1, (heads, -1)), VALUE).flatten(2)


def narrow(out: Tensor, heads: int, d: int) -> Tensor:
    """out [B, N, H * (d + p)] -> [B, N, H * d]."""
    return out.unflatten(-1, (heads, -1))[..., :d].flatten(2)


def width(heads: int, d: int) -> int:
    """H * (d + p)."""
    return heads * (d + extra_channels(d))


def head_size(attention: nn.Module, heads: int, x: Tensor) -> int:
    """d of a layer that is given x [B, N, C]."""
    return getattr(attention.to_q, "out_features", x.shape[-1]) // heads


def trial_dtype(x: Tensor) -> torch.dtype:
    """What to try an attention code in that is given x."""
    return x.dtype if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float32


def find_rule(
    forward: Callable[..., Tensor],
    d: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    layer: Callable[..., Any] = SimpleNamespace,
    heads: int = 2,
    context: str = "context",
    widens_x: bool = True,
) -> str | None:
    """How an attention's forward(self, x, context) scales: OWN, GIVEN, or None where widened heads do not go.

    Runs it on a few fixed tokens in place of a layer and compares with attention in float64. Draws nothing.

    Args:
        layer: makes the `self` that forward gets, from its parts by name (to_q, heads, scale, ...).
        heads: how many it is told that there are. context: the name of the argument that keys are made from.
        widens_x: whether x will have the channels of the wider heads, too. Codes may take the heads' size from it.
    """
    tokens, keys = 6, 5
    q, k, v = (_waves(n, heads * d, phase) for n, phase in ((tokens, 0.0), (keys, 1.0), (keys, 2.0)))
    bias = torch.arange(keys, dtype=torch.float64)[None] / 2  # (1, M)
    q = q * d**0.5 / 4  # logits of a few units, so that a wrong scale shows
    expected = _attention(q, k, v, heads, bias)
    given = [t.to(device, dtype) for t in (q, k, v)]
    x = given[0].new_zeros(1, tokens, width(heads, d) if widens_x else heads * d)
    arguments = {context: given[0].new_zeros(1, keys, heads * d)}
    errors = {}
    for rule in (OWN, GIVEN):
        try:
            with torch.no_grad():
                found = forward(layer(**_parts(rule, heads, d, *given, bias.float().to(device))), x, **arguments)
            found = narrow(found, heads, d)
        except Exception as error:  # whatever a foreign attention raises on heads that it did not expect
            if is_out_of_memory(error):
                raise
            continue
        if found.shape == expected.shape:
            errors[rule] = float((found.cpu().double() - expected).abs().max())
    best = min(errors, key=errors.get, default=None)
    return best if best is not None and errors[best] < 0.02 else None


def meets_at_sdpa(
    forward: Callable[..., Tensor],
    d: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    layer: Callable[..., Any] = SimpleNamespace,
    heads: int = 2,
) -> bool:
    """Whether an attention's forward(self, x) gives the heads of all its tokens, once and without a mask, to torch's
    scaled_dot_product_attention. Found out as in find_rule; queries and keys may be normed in between."""
    rows, tokens, seen = 2, 6, []
    q, k, v = (_waves(tokens, heads * d, phase).expand(rows, -1, -1).to(device, dtype) for phase in (0.0, 1.0, 2.0))
    parts = _layer(heads, d) | {"to_q": lambda x: q, "to_k": lambda x: k, "to_v": lambda x: v}

    def handler(attention: HostAttention, *given: Tensor) -> Tensor:
        seen.append((attention.is_plain and not attention.options.get("dropout_p"), *given))
        return attention(*given)

    try:
        with torch.no_grad(), AroundSdpa(handler):
            forward(layer(**parts), q.new_zeros(rows, tokens, heads * d))
    except Exception as error:  # whatever a foreign attention raises
        if is_out_of_memory(error):
            raise
        return False
    if len(seen) != 1:
        return False
    plain, *given = seen[0]
    expected = v.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, N, d)
    return plain and all(x.shape == expected.shape for x in given) and torch.equal(given[2].to(dtype), expected)


def why_no_self_token(
    meets: Callable[[], bool], d: int, device: torch.device, dtype: torch.dtype, multires: bool = False
) -> str | None:
    """Why the queries of a layer with heads of d channels cannot keep their own tokens (core/self_token.py), or have
    keys at three resolutions where that is what is wanted; None: they can.

    meets: asks meets_at_sdpa, or what it once answered.
    """
    if not is_torchs_sdpa() or not meets():
        return NOT_MULTIRES if multires else NOT_KEPT
    if multires:  # wants no log-sum-exp
        return None
    if choose_kernel(TORCHS, device, dtype, d) is None:
        return NO_LSE
    return None


def is_met(config: ToMeConfig, d: int, x: Tensor, meets: Callable[[], bool]) -> bool:
    """Whether a kernel that weighs keys where they meet the queries takes the heads of a layer that is given x, where
    keys of different weights are to be expected: sampling by a whole number leaves all alike as a rule. meets: as in
    why_no_self_token."""
    uneven = config.kind.matches or config.ratio_end >= 0.0 or 1.0 % (1.0 - config.ratio) > 0.0
    wanted = config.weighs_keys and uneven and torch.cuda.is_available()
    return wanted and kernels.attends(d, trial_dtype(x)) and kernels.serves(x) and meets()


def stand_in(attention: nn.Module) -> Callable[..., nn.Module]:
    """Makes a copy of a layer (its parameters shared, its hooks left behind) with other projections: a `layer` for
    the trials here."""

    def make(**parts: Any) -> nn.Module:
        layer = copy.copy(attention)
        layer.__dict__["_modules"] = {**attention._modules, **{name: parts[name] for name in (*PROJECTIONS, "to_out")}}
        return layer

    return make


def _layer(heads: int, d: int) -> dict[str, Any]:
    """What attention codes read of a layer, but its projections of tokens."""
    return {
        "heads": heads,
        "dim_head": d,
        "scale": d**-0.5,
        "training": False,
        "backend": None,
        "attention_op": None,
        "to_out": nn.Sequential(nn.Identity(), nn.Identity()),
    }


def _parts(rule: str, heads: int, d: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> dict[str, Any]:
    return _layer(heads, d) | {
        "to_q": lambda x: widen_query(q, heads, rule),
        "to_k": lambda x: widen_key(k, heads, rule, bias),
        "to_v": lambda x: widen_value(v, heads),
    }


def _waves(tokens: int, channels: int, phase: float) -> Tensor:
    index = torch.arange(tokens * channels, dtype=torch.float64).reshape(1, tokens, channels)
    return torch.sin(index * 0.7 + phase + index**2 * 0.01)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (1, H, ., d)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias[:, None, None]
    return (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
