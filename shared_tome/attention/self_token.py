"""Why queries do not keep their own tokens somewhere (core/self_token.py), for people."""

from __future__ import annotations

import torch
from torch import Tensor

# What adapters say where no kernel that tells its log-sum-exp is at hand.
NOT_KEPT = "own token has no effect: another attention than PyTorch's is in use"
NO_LSE = "own token has no effect: this PyTorch gives no log-sum-exp of its attention here"


def loses_gradient(*tensors: Tensor) -> bool:
    """Whether a gradient is asked for that kernels which tell their log-sum-exp do not carry."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def why_no_self_token_here(
    q: Tensor, k: Tensor, v: Tensor, masked: bool, torchs: bool, not_torchs: str | None = None
) -> str:
    """What to say where JointCall.attend keeps no own tokens.

    q, k, v: [B, H, ., d]; torchs: by PyTorch's attention; not_torchs: why not, where that is known.
    """
    if masked:
        return "own token has no effect under a mask"
    if not torchs:
        return NOT_KEPT if not_torchs is None else f"own token has no effect beside {not_torchs}"
    if q.shape[2] != k.shape[2]:
        return "own token has no effect where an attention takes a part of the queries alone"
    if q.shape[1] != k.shape[1]:
        return "own token has no effect: several heads share their keys"
    if loses_gradient(q, k, v):
        return "own token has no effect where a gradient is asked for; use torch.no_grad() where none is wanted"
    return NO_LSE
