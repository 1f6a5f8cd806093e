"""A space-filling curve over a grid: tokens that follow each other in it are neighbours in the picture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .grid import Grid, split_frames

# Torch 2.1 and 2.2 (AUTOMATIC1111 1.10 pins 2.1.2) do not have it.
is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)


def is_traced() -> bool:
    """Whether new tensors may be stand-ins (torch.compile's, torch.export's, FakeTensorMode's). None may be kept."""
    return is_compiling() or bool(_get_current_dispatch_mode_stack())


def is_stand_in(x: Tensor) -> bool:
    """Whether a tensor is another one's stand-in, of a trace or of torch.func. It means nothing after the call."""
    return type(x) is not Tensor or (not is_compiling() and _is_wrapped(x))


# Torch 2.1 asks for each kind.
_is_wrapped = getattr(
    torch._C._functorch,
    "is_functorch_wrapped_tensor",
    lambda x: torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_gradtrackingtensor(x),
)


def _table(*rows: tuple[int, int, int, int]) -> int:
    """Numbers of two bits as one, the first in the lowest bits."""
    return sum(entry << 2 * place for place, entry in enumerate(entry for row in rows for entry in row))


# A Hilbert curve stands in one of four ways: a row for each. In it, by 2 * (right half) + (lower half): as which of the
# four this quadrant is passed, 0 to 3, and how the curve stands in it.
_QUADRANT = _table((0, 1, 3, 2), (0, 3, 1, 2), (2, 3, 1, 0), (2, 1, 3, 0))
_STATE = _table((1, 0, 3, 0), (0, 2, 1, 1), (2, 1, 2, 3), (3, 3, 0, 2))


def remembered(make: Callable[..., Any]) -> Callable[..., Any]:
    """A pure function, whose tensors are made once for the same arguments. Do not write to them: they are shared.

    Traced anew under torch.compile, where a remembered tensor would become a constant of the graph.
    """

    @functools.lru_cache(maxsize=64)
    def known(*given: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return make(*given)

    @functools.wraps(make)
    def found(*given: Any) -> Any:
        return make(*given) if is_traced() else known(*given)

    return found


@remembered
def curve_order(grid: Grid, device: torch.device) -> Tensor:
    """The tokens of a grid in the order of a Hilbert curve, [N] int64; in video two frames at a time, four tokens of
    each by turns.

    So a run of four is a 2x2 cell of one frame and a run of eight the same cell of two frames: neighbours in time
    are mostly alike, but less so than neighbours in a frame (a latent frame stands for several of the video).
    """
    frames, height, width = split_frames(grid)
    plane = hilbert_order((height, width), device)
    if frames == 1:
        return plane
    place = torch.empty_like(plane).scatter(0, plane, torch.arange(height * width, device=device))  # (H * W,)
    frame = torch.arange(frames, device=device)[:, None]  # (F, 1)
    pair = -(-height * width // 4) * 8  # places that two frames take
    along = frame // 2 * pair + place // 4 * 8 + frame % 2 * 4 + place % 4  # (F, H * W)
    return along.flatten().to(torch.int32).argsort()  # (F * H * W,)


def hilbert_order(grid: Grid, device: torch.device) -> Tensor:
    """One frame's: the Hilbert curve of the enclosing square, without the tokens outside the grid (height, width).

    A grid with one row or column is left in its own order.
    """
    height, width = grid
    index = torch.arange(height * width, device=device)
    if height == 1 or width == 1:
        return index
    y, x = index // width, index % width
    distance, state = torch.zeros_like(index), torch.zeros_like(index)
    half = 1 << (max(height, width) - 1).bit_length() >> 1
    # From the coarsest bit on: which quadrant, then how the curve stands in it. Each step reads the state once: a
    # compiler writes each step into the next, which takes minutes where there are two ways into the one before.
    while half:
        entry = 8 * state + 4 * ((x & half) > 0) + 2 * ((y & half) > 0)
        distance, state = 4 * distance + (_QUADRANT >> entry & 3), _STATE >> entry & 3
        half //= 2
    return distance.to(torch.int32).argsort()  # not every backend sorts int64
