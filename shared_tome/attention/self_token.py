"""Why queries do not keep their own tokens somewhere (core/self_token.py), for people."""

from __future__ import annotations

from torch import Tensor

# What adapters say where no kernel that tells its log-sum-exp is at hand.
NOT_KEPT = "own token has no effect: another attention than PyTorch's is in use"
NO_LSE = "own token has no effect: this PyTorch gives no log-sum-exp of its attention here"


def why_no_self_token_here(q: Tensor, k: Tensor, masked: bool, torchs: bool) -> str:
    """What to say where JointCall.attend keeps no own tokens. q, k: [B, H, ., d]; torchs: by PyTorch's attention."""
    if masked:
        return "own token has no effect under a mask"
    if not torchs:
        return NOT_KEPT
    if q.shape[2] != k.shape[2]:
        return "own token has no effect where an attention takes a part of the queries alone"
    if q.shape[1] != k.shape[1]:
        return "own token has no effect: several heads share their keys"
    return NO_LSE
