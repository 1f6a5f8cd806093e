"""Attention to keys that do not all count alike, in several calls, combined as one softmax would.

Keys of one weight go into a call of their own. A call's outcome o and the logarithm l of its sum of exponentials are
all that is needed to join it with the others: the softmax over all keys is sum(o_i w_i exp(l_i)) / sum(w_i exp(l_i)).
Heads keep their size, which a bias by further channels (core/channels.py) does not, and the fast kernels take no mask.

The kernels are torch's own operators behind scaled_dot_product_attention, called where they return l too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.curve import is_compiling

# By torch's numbers of them (SDPBackend); a further one, plain matrix products, tells no l.
_NUMBERS = {1: "flash", 2: "efficient", 3: "cudnn"}
KERNELS = tuple(_NUMBERS.values())
# In place of an order: the one kernel that torch's attention would take by itself, whatever was preferred or switched
# off for it.
TORCHS = ("torch",)
# Part of an attention's keys: k and v [B, H, M, d], and the logarithm of what each of these keys counts.
Part = tuple[Tensor, Tensor, float]


def choose_kernel(order: Sequence[str], device: torch.device, dtype: torch.dtype, d: int) -> str | None:
    """The first kernel in `order` that takes heads of d channels on this device and is not switched off; None: none.

    order: of KERNELS; any other name ends it. Or TORCHS. On the CPU the one kernel there, "cpu".
    """
    if device.type == "cpu":  # torch 2.3; the switch is the CPU's too
        able = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        return "cpu" if able and torch.backends.cuda.flash_sdp_enabled() else None
    if device.type != "cuda" or torch.version.hip or d % 8:
        return None
    try:
        able = {
            "flash": torch.backends.cuda.can_use_flash_attention,
            "efficient": torch.backends.cuda.can_use_efficient_attention,
            "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        }
        x = torch.empty(1, 2, 64, d, device=device, dtype=dtype)
        if order == TORCHS:  # an order of ours would miss what it prefers, cuDNN on an H100
            return _NUMBERS.get(torch._fused_sdp_choice(x, x, x))
        params = torch.backends.cuda.SDPAParams(x, x, x, None, 0.0, False, False)
    except (AttributeError, TypeError):  # before torch 2.5
        return None
    for name in order:
        if name not in able:
            return None
        if able[name](params):
            return name
    return None


# Under torch.compile it is asked while the graph is made, as torch asks for its own (see kernels.ready).
choose_kernel._dynamo_marked_constant = True


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, kernel: str, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention and the natural logarithm of each query's sum of exponentials.

    Args:
        q: [B, H, N, d], k and v: [B, H, M, d], their channels next to each other in memory; M > 1 for cudnn.
        kernel: from choose_kernel. scale: of the logits; None: d ** -0.5.
    Returns:
        [B, H, N, d] and [B, H, N], float32 or wider. They carry no gradient that is right.
    """
    ops = torch.ops.aten
    if kernel == "cpu":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)[:2]
    elif kernel == "cudnn":
        out, lse = ops._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    elif kernel == "efficient":
        out, lse = ops._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    else:
        out, lse = ops._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    # Some kernels pad the queries, one has a last dimension of one.
    return out, lse.reshape(*q.shape[:2], -1)[:, :, : q.shape[2]]


def attend_in_parts(q: Tensor, parts: Sequence[Part], kernel: str, scale: float | None = None) -> Tensor:
    """One softmax over all parts' keys, weighed.

    Args:
        q: [B, H, N, d]; parts: those that weigh most first; kernel, scale: see attend_with_lse.
    Returns:
        [B, N, H, d], contiguous.
    """
    return attend_in_parts_with_lse(q, parts, kernel, scale, whole=False)[0].transpose(1, 2).contiguous()


def attend_in_parts_with_lse(
    q: Tensor, parts: Sequence[Part], kernel: str, scale: float | None = None, whole: bool = True
) -> tuple[Tensor, Tensor]:
    """The same as [B, H, N, d], and the natural logarithm of each query's weighed sum of exponentials less the heaviest
    part's weight, parts[0][2]; [B, H, N]. whole: the logarithm is of all parts, or of all but the last."""
    out, lse, heaviest = None, None, parts[0][2]
    for number, (k, v, weight) in enumerate(parts):
        part, part_lse = attend_with_lse(q, k, v, kernel, scale)
        if out is None:
            out, lse = part, part_lse
            continue
        if weight != heaviest:
            part_lse = part_lse + (weight - heaviest)
        # The lighter part's share is what gets rounded: near 0 half precision is fine enough, near 1 it is not.
        share = (part_lse - lse).sigmoid()[..., None].to(out.dtype)
        if whole or number + 1 < len(parts):
            lse = torch.logaddexp(lse, part_lse)
        out = _lerp(out, part, share)
    return out, lse


def _lerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """a + (b - a) * share, all [B, H, N, .]; a may be written to."""
    if is_compiling():
        return torch.lerp(a, b, share)
    if a.transpose(1, 2).is_contiguous():
        return a.lerp_(b, share)
    # In the memory order that the outcome is wanted in: the copy comes for nothing.
    out = torch.empty_like(a.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return torch.lerp(a, b, share, out=out)
