"""Why queries do not keep their own tokens somewhere (core/self_token.py), for people."""

from __future__ import annotations

from torch import Tensor

# What adapters say where no kernel that tells its log-sum-exp is at hand.
NOT_KEPT = "another attention than PyTorch's is in use; queries do not keep their own tokens"
NO_LSE = "this PyTorch tells no log-sum-exps of its attention here; queries do not keep their own tokens"


def why_not_kept(q: Tensor, k: Tensor, masked: bool, torchs: bool) -> str:
    """What to say where JointCall.attend keeps no own tokens. q, k: [B, H, ., d]; torchs: by PyTorch's attention."""
    if masked:
        return "under a mask queries do not keep their own tokens"
    if not torchs:
        return NOT_KEPT
    if q.shape[2] != k.shape[2]:
        return "an attention takes a part of the queries alone; these do not keep their own tokens"
    if q.shape[1] != k.shape[1]:
        return "several heads share their keys; queries do not keep their own tokens"
    return NO_LSE
