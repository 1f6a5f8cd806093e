"""Which failures tell something about what was tried, and which about the moment alone."""

from __future__ import annotations

import torch

# Of cuBLAS, cuDNN and torch's CPU allocator, which raise a plain RuntimeError.
_SIGNS = ("out of memory", "alloc_failed", "not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. Nothing may be decided by it: with more memory what was tried may well work."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
