"""levels "auto" on a GPU: whether merging a layer pays there, measured once and kept in a file.

At its first use a layer of a shape is run a few times on made-up tokens, whole and merged, everything that merging
needs included. Why: docs/design.md, "Whether merging pays is measured".
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.bias import attend_tokens
from ..attention.sequence import JointCall
from ..config import ToMeConfig
from ..core.failures import is_out_of_memory
from ..core.grid import Grid
from ..merging.call import ModelCall
from . import timing
from .paying import Decision
from .store import BETWEEN, store_of
from .surroundings import surroundings

log = logging.getLogger("ToMe")

# 0 measures nothing: every layer with at least min_tokens is merged.
SWITCH = "TOME_MEASURE"
# From here on attention takes so long that merging pays on any device (docs/speed.md).
ALWAYS = 16384
# A picture with guidance. Never the rows of the call: hosts split batches as memory and GPUs allow, and a picture in a
# batch is to be that which it is alone. More rows pay sooner, so this is on the safe side.
ROWS = 2
_SWITCHES = {1: "flash", 2: "mem_efficient", 3: "cudnn"}  # torch.backends.cuda.*_sdp_enabled, by torch's numbers

# attention(q, k, v, heads, scale=None): [B, N, H * d], [B, M, H * d] twice -> [B, N, H * d]
Attention = Callable[..., Tensor]
# Of tokens x [B, N, C] that may be written to: what runs the host's own block on them, or None where there is none.
BlockMaker = Callable[[Tensor], "Callable[[], Any] | None"]


def ways(config: ToMeConfig, keeps_self: bool) -> list[str]:
    """The options that a layer's times depend on, in words."""
    how = [config.method, f"{config.ratio:.4f}"]
    if config.kind.matches:
        how += ["x".join(map(str, config.stride)), config.partition, config.reduce, f"share {config.share_match}"]
    if config.shares_by_hand:
        how.append(f"shares {config.whole:.3f} {config.half:.3f}")
    return [*how, f"proportional {config.proportional}", *(["own"] if keeps_self else [])]


@dataclass(frozen=True)
class Case:
    """A layer that is measured: the grid of its tokens, channels, heads, and how it would be merged.

    attention: the name of the function; kernels: those of torch's that it would try, in its order, where an adapter
    knows them. about: what else of the model its times depend on, in words: its attention code, its weights.
    """

    grid: Grid
    channels: int
    heads: int
    dtype: torch.dtype
    config: ToMeConfig
    attention: str = "torch"
    kernels: tuple[str, ...] = ()
    about: str = ""

    @property
    def keeps_self(self) -> bool:
        return bool(self.kernels) and self.config.keeps_self

    @property
    def sees_heads(self) -> bool:
        """Whether the attention gets the heads of all tokens (attention/sequence.py)."""
        return bool(self.kernels) and self.config.wants_heads

    @functools.cached_property
    def key(self) -> str:
        """What tells it from other layers on one device."""
        grid = "x".join(map(str, self.grid))
        shape = [grid, f"{self.channels}/{self.heads}", str(self.dtype).removeprefix("torch.")]
        how = ways(self.config, self.keeps_self)
        about = [self.about] if self.about else []
        return ", ".join([*shape, " ".join([self.attention, *self.kernels]), *about, *how])


def measures(config: ToMeConfig, grid: Grid, device: torch.device) -> bool:
    """Whether a layer on this grid is one that is measured."""
    return config.levels == "auto" and math.prod(grid) < ALWAYS and may_measure(device)


def may_measure(device: torch.device) -> bool:
    """Whether anything is measured on this device."""
    return device.type == "cuda" and os.environ.get(SWITCH, "1") != "0"


def decision_on(
    grid: Grid,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    config: ToMeConfig,
    attention: Attention | None = None,
    kernels: tuple[str, ...] = (),
    block: BlockMaker | None = None,
    about: str = "",
) -> Decision | None:
    """What is known of a layer's times on a device, or None where nothing is or can be measured.

    attention: the host's (None: torch's). kernels: those of torch's that it tries, in its order, where queries can keep
    their own tokens by them (sequence.JointCall); none where they cannot. block: the block that the layer is in. about:
    see Case. Never called where torch.compile traces.
    """
    about = about if block is not None else ", ".join([*([about] if about else []), "without its block"])
    case = _case(grid, channels, heads, dtype, config, name_of(attention, device), kernels, about)
    return known_or_measured(case.key, device, lambda: measure(case, device, attention, block))


def known_on(
    grid: Grid,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    config: ToMeConfig,
    attention: Attention | None = None,
    kernels: tuple[str, ...] = (),
    about: str = "",
) -> Decision | None:
    """decision_on, in its block, of what has been measured before; measures nothing."""
    case = _case(grid, channels, heads, dtype, config, name_of(attention, device), kernels, about)
    return known_of(case.key, device)


def name_of(attention: Attention | None, device: torch.device) -> str:
    """What tells an attention from others; torch's own, by the kernels that are switched on now, in its order."""
    if attention is not None:
        named = attention if hasattr(attention, "__qualname__") else type(attention)
        return f"{named.__module__}.{named.__qualname__}"
    if device.type == "cuda":
        put_in_order(device)
    order = getattr(torch._C, "_get_sdp_priority_order", lambda: list(_SWITCHES))()  # torch 2.6
    names = (_SWITCHES[int(number)] for number in order if int(number) in _SWITCHES)
    return " ".join(["torch", *(name for name in names if getattr(torch.backends.cuda, f"{name}_sdp_enabled")())])


@functools.lru_cache(maxsize=8)
def put_in_order(device: torch.device) -> None:
    """torch puts its kernels into a device's order (cuDNN first on an H100) when it is first asked for one."""
    x = torch.empty(1, 1, 64, 64, device=device, dtype=torch.float16)
    try:
        torch._fused_sdp_choice(x, x, x)
    except (AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):  # not remembered: the order would stay another one
            raise


# A host asks for each call of a model; making the key takes longer than a small step has to spare.
@functools.lru_cache(maxsize=256)
def _case(
    grid: Grid,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    config: ToMeConfig,
    attention: str,
    kernels: tuple[str, ...],
    about: str,
) -> Case:
    """The layer, with the options alone that its times depend on."""
    config = config.replace(
        start=0.0, end=1.0, ratio_end=-1.0, min_tokens=0, seed=0, cross_attention=False, mlp=False, exact_every=0
    )
    return Case(grid, channels, heads, dtype, config, attention, kernels, about)


def _full_key(key: str, device: torch.device) -> str:
    return f"{key}{BETWEEN}{surroundings(device)}"


def known_of(key: str, device: torch.device) -> Decision | None:
    """The decision of a name on a device, where it has been measured before."""
    return store_of(device).known(_full_key(key, device))


def known_or_measured(key: str, device: torch.device, measure: Callable[[], Decision]) -> Decision | None:
    """The decision of a name on a device. None where it cannot be measured."""

    def measured() -> Decision:
        decision = measure()
        *times, busy = asdict(decision).values()
        where_busy = "pays where the GPU is busy" if decision.pays(waits=False) else "does not pay"
        log.info(
            "[ToMe] %s: %s, measured on %s: %.0f us whole, %.0f merged, %.0f more of the processor; its block: %.0f us "
            "and %.0f of the processor%s",
            key,
            "pays" if decision.pays() else where_busy,
            torch.cuda.get_device_name(device),
            *times,
            "; the GPU is busy all the time" if busy else "",
        )
        return decision

    # While a CUDA graph is captured nothing can be measured, nor may a layer be merged whose warm-up was not.
    captures = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return None if captures else store_of(device).get(_full_key(key, device), measured)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """torch's own, as an Attention."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, ., d)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


@torch.no_grad()
def measure(
    case: Case, device: torch.device, attention: Attention | None = None, block: BlockMaker | None = None
) -> Decision:
    """Times of a layer on made-up tokens, projections included, and of its block."""
    run = torch_attention if attention is None else attention
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    x = drawn(ROWS, math.prod(case.grid), case.channels)
    weight = drawn(case.channels, case.channels) * case.channels**-0.5
    call = ModelCall(case.config, case.grid, device, step=torch.zeros((), dtype=torch.int64, device=device))

    def full() -> Tensor:
        q, k, v = (F.linear(x, weight) for _ in range(3))
        return F.linear(run(q, k, v, case.heads), weight)

    joint = JointCall(True, case.kernels, lambda *_: None, case.keeps_self) if case.sees_heads else None

    def merged() -> Tensor:
        layer = call.attention(x, x, x, case.grid, keeps_self=joint is not None)
        if layer is None:  # the ratio takes away no whole token
            return full()
        q, k, v = (F.linear(part, weight) for part in (layer.q, layer.k, layer.v))
        if joint is not None:
            own = joint.attend(
                *(part.unflatten(-1, (case.heads, -1)).transpose(1, 2) for part in (q, k, v)), 0, layer.plan
            )
            if own is not None:  # (B, N, H, d)
                return F.linear(own.flatten(2), weight)
            k, v = layer.plan.merge(k), layer.plan.merge(v)
        if layer.bias is None:
            out = run(q, k, v, case.heads)
        else:

            def inner(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
                return run(q, k, v, case.heads, scale=scale)

            is_torchs = attention is None or bool(case.kernels)
            out = attend_tokens(q, k, v, case.heads, layer.bias, inner, is_torchs)
        return layer.unmerge(F.linear(out, weight))

    found, run_block = timing.compared(full, merged, device), block and block(x.clone())
    if run_block is None:
        return found
    gpu, cpu = timing.times_of(run_block, device)
    return dataclasses.replace(found, block_us=gpu, block_cpu_us=cpu)
