"""Whether the kernels may be used: in this process, in this context, on these tensors.

Importing this package imports no triton; the first tensor on a CUDA device does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ..core.curve import is_compiling
from ..core.failures import is_out_of_memory
from .names import NAMESPACE, log

# "auto": kernels where they serve; "reference": plain torch everywhere. The environment variable takes 1 and 0 as well.
SWITCH = "TOME_KERNELS"
CHOICES = ("auto", "reference")
_NUMBERS = {"1": "auto", "0": "reference"}
# Triton's interpreter runs kernels on the CPU, for the tests alone; it must be asked for before triton is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_choice: ContextVar[str] = ContextVar("choice", default="auto")


@contextmanager
def use(impl: str) -> Iterator[None]:
    """In this context, "auto" or "reference" in place of "auto". TOME_KERNELS=reference holds all the same.

    Raises ValueError for another word.
    """
    if impl not in CHOICES:
        raise ValueError(f"impl must be one of {', '.join(CHOICES)}, got {impl!r}")
    before = _choice.set(impl)
    try:
        yield
    finally:
        _choice.reset(before)


def ready() -> bool:
    """Whether kernels can run here: triton is there, torch is new enough. Loads them the first time."""
    return _choice.get() == "auto" and load() is not None


# What torch.compiler.assume_constant_result sets; calling that would import all of dynamo along with the core.
ready._dynamo_marked_constant = True


@functools.lru_cache(maxsize=1)
def load():
    """The operators (impl/ops.py), or None."""
    wanted = os.environ.get(SWITCH, "auto")
    wanted = _NUMBERS.get(wanted, wanted)
    if wanted not in CHOICES:
        log.warning("[ToMe] %s must be one of %s, got %r; kernels stay on", SWITCH, ", ".join(CHOICES), wanted)
    if wanted == "reference" or not hasattr(torch.library, "custom_op"):  # torch 2.4
        return None
    try:
        from .impl import ops
    except Exception as error:  # a broken triton raises what it likes
        if is_out_of_memory(error):
            raise
        log.info("no Triton kernels (%s: %s); plain torch does the work", type(error).__name__, error)
        return None
    return ops


def version() -> str | None:
    """Triton's version where kernels can run in this process, else None."""
    return None if load() is None else load().VERSION


def serves(*tensors: Tensor) -> bool:
    """Whether kernels may be used on these tensors."""
    first = tensors[0]
    if not (first.is_cuda or (_INTERPRETED and first.device.type == "cpu")):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    for x in tensors:  # no generator: asked several times an attention
        if x.device != first.device:
            return False
    return ready()


def operator(name: str):
    """A kernel: direct where nothing is traced, since torch's dispatcher costs more than a launch."""
    return getattr(getattr(torch.ops, NAMESPACE), name) if is_compiling() else load().DIRECT[name]
