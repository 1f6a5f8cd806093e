"""Puts a variant of ToMe on the lab's U-Nets and DiTs through the core's ModelCall.

What is measured is the core's own arithmetic; this is only the adapter, and does what the hosts' adapters do. In a
U-Net tokens are merged before the projections, brought back after the output projection, and a block's match serves
its cross-attention and MLP. In a DiT the image's queries, keys and values are merged where they meet the text's,
behind the rotation; the text stays whole. Where queries keep their own tokens, keys and values are drawn behind their
projections in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_tome import ModelCall
from shared_tome.attention.bias import attend
from shared_tome.attention.combine import TORCHS
from shared_tome.attention.sequence import JointCall
from shared_tome.core.grid import Grid, grid_of
from shared_tome.core.schedule import ratio_at, serves_layer
from shared_tome.merging.plan import Plan
from shared_tome.merging.residual import ResidualCall, Residuals

from ..models.dit import DiT, JointAttention
from ..models.unet import BasicTransformerBlock, CrossAttention, UNet
from .methods import Variant
from .tails import attend_tails


class Run:
    """A variant during one run of a sampler: the plans of the current step, and a count of the work left.

    Call `begin` before each call of the model. seed: [b], one number a picture, b a divisor of the batch's rows.
    dtype: of the attention's q, k and v (None: the model's own).
    """

    def __init__(self, variant: Variant, dtype: torch.dtype | None = None):
        self.variant, self.dtype = variant, dtype
        self.call: ModelCall | None = None
        self.joint: JointCall | None = None  # of the current step, where queries keep their own tokens
        self.full: Grid = (0, 0)
        self.plan: Plan | None = None  # the current block's, for cross-attention and MLP
        self.work = {"full": 0, "left": 0, "all": 0, "all_left": 0}
        # Of one picture each. both: exact and drawn; held: attentions that give what they gave before.
        self.calls = dict.fromkeys(("whole", "merged", "both", "held"), 0)
        self.ran: dict[int, int] = {}  # the same by step
        self.pictures = 1  # of this call
        self.held = False  # whether this step's attentions give what they gave before
        self.keeps = False  # whether they are exact and to be kept
        is_residual = variant.hold is not None and variant.hold.between == "residual"
        self._residuals = Residuals(variant.hold.every, lambda why: _refused(why, "")) if is_residual else None
        self.residual: ResidualCall | None = None  # of this step
        self._drawn: tuple[ModelCall | None, JointCall | None] = (None, None)  # of a step that is exact and drawn
        self._each_head = False

    def begin(self, full: Grid, device: torch.device, seed: Tensor, step: int, steps: int) -> None:
        config = self.variant.config
        self.full, self.call, self.plan = full, None, None
        now = config.replace(ratio=ratio_at(config, step / steps), start=0.0, end=1.0, ratio_end=-1.0)
        hold, self.residual = self.variant.hold, None
        since = hold.since(step, steps) if hold else 0
        if self._residuals is not None and hold.begun(step, steps):
            self.residual = self._residuals.call(step, step, step, ("pictures",), now.ratio)
        if now.ratio > 0.0:
            draw = self.residual.draw if self.residual else 0 if self.variant.one_draw else step
            self.call = ModelCall(now, full, device, seed, draw)
        self.joint = JointCall(True, TORCHS, _refused, now.keeps_self) if self.call and now.wants_heads else None
        self.held = self.keeps = False
        if hold is not None:
            self.held = hold.between == "held" and since > 0
            self.keeps = hold.between == "held" and hold.begun(step, steps) and since == 0
            if since == 0:
                self._drawn, self.call, self.joint = (self.call, self.joint), None, None
        self.pictures = seed.numel()
        both = self.residual is not None and since == 0
        kind = "held" if self.held else "both" if both else "whole" if self.call is None else "merged"
        self.calls[kind] += self.pictures
        self.ran[step] = self.ran.get(step, 0) + self.pictures

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """In a step that is exact: what it would be drawn. The exact one counts as the step's full work."""
        (self.call, self.joint), self._each_head = self._drawn, True
        try:
            yield
        finally:
            self.call, self.joint, self._each_head = None, None, False

    def attend_behind(self, q: Tensor, k: Tensor, v: Tensor, start: int, plan: Plan) -> Tensor:
        """q, k, v [B, H, L, d], the image from `start` on -> [B, L, H, d]; keys and values drawn here."""
        out = self.joint.attend(q, k, v, start, plan)
        if out is None:
            raise RuntimeError(f"no attention here tells its log-sum-exp for {q.dtype} on {q.device}: no own tokens")
        return out

    def count(self, grid: Grid, tokens: int, queries: int, keys: int) -> None:
        """Count the work of Q K^T and A V; all blocks of a level have the same width for each token.

        tokens: of the unmerged layer, text included where the softmax has it; so are queries and keys.
        """
        full, left = self.pictures * tokens * tokens * (not self._each_head), self.pictures * queries * keys
        if self.variant.is_merged and serves_layer(self.variant.config, grid, self.full):
            self.work["full"] += full
            self.work["left"] += left
        self.work["all"] += full
        self.work["all_left"] += left

    @property
    def cost(self) -> float:
        """The share of the merged layers' attention work that is left, over the whole run."""
        return self.work["left"] / self.work["full"] if self.work["full"] else 1.0

    @property
    def cost_all(self) -> float:
        """The same over every self-attention of the model."""
        return self.work["all_left"] / self.work["all"] if self.work["all"] else 1.0


class MergedSelfAttention(nn.Module):
    """Stands in for a block's attn1."""

    def __init__(self, inner: CrossAttention, run: Run):
        super().__init__()
        self.inner, self.run = inner, run

    def forward(self, x: Tensor) -> Tensor:
        run, inner = self.run, self.inner
        tokens = x.shape[1]
        grid = grid_of(tokens, run.full)
        if run.variant.tiles and grid == run.full:
            return self._in_tiles(x, grid, run.variant.tiles)
        behind = run.joint is not None
        layer = None if run.call is None else run.call.attention(x, x, x, grid, keeps_self=behind)
        parts = (x, x, x) if layer is None else (layer.q, layer.k, layer.v)
        run.plan = layer.plan if layer is not None and run.call.config.kind.matches else None
        keys = layer.plan.kept + 1 if layer is not None and behind else parts[1].shape[1]
        run.count(grid, tokens, parts[0].shape[1], keys)
        q, k, v = map(self._heads, (inner.to_q, inner.to_k, inner.to_v), parts)
        if layer is None:
            return self._out(attend(q, k, v), x.dtype)
        if behind:
            out = run.attend_behind(q, k, v, 0, layer.plan).transpose(1, 2)
        else:
            out = attend(q, k, v, layer.bias)  # (B, H, N or M, d)
        return layer.unmerge(self._out(out, x.dtype))  # (B, N, C)

    def _in_tiles(self, x: Tensor, grid: Grid, tiles: int) -> Tensor:
        """x [B, N, C] -> [B, N, C]. Raises ValueError where the grid has no such tiles."""
        run, inner, (batch, tokens, channels) = self.run, self.inner, x.shape
        height, width = (side // tiles for side in grid)
        if (height * tiles, width * tiles) != grid:
            raise ValueError(f"a grid of {grid} tokens cannot be cut into {tiles} x {tiles} tiles")
        run.count(grid, tokens, tokens, tokens // tiles**2)
        cut = (batch, tiles, height, tiles, width, channels)
        queries = x.view(cut).transpose(2, 3).reshape(-1, height * width, channels)
        keys = x.reshape(-1, height * width, channels) if run.variant.strips else queries
        q = self._heads(inner.to_q, queries)
        k, v = (self._heads(project, keys) for project in (inner.to_k, inner.to_v))
        out = self._out(attend(q, k, v), x.dtype)
        return out.view(batch, tiles, tiles, height, width, channels).transpose(2, 3).reshape(x.shape)

    def _heads(self, project: nn.Linear, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, H, N, d]."""
        x = self.inner._split(project(x))
        return x if self.run.dtype is None else x.to(self.run.dtype)

    def _out(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [B, H, N, d] -> [B, N, C]."""
        return self.inner.to_out(x.to(dtype).transpose(1, 2).flatten(2))


class MergedPart(nn.Module):
    """Stands in for a block's attn2 or ff, whose tokens go by the block's own match where the option says so."""

    def __init__(self, inner: nn.Module, run: Run, option: str):
        super().__init__()
        self.inner, self.run, self.option = inner, run, option

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        plan = self.run.plan
        if plan is None or not getattr(self.run.variant.config, self.option):
            return self.inner(x, *context)
        return plan.unmerge(self.inner(plan.merge(x), *context))


class MergedJointAttention(nn.Module):
    """Stands in for a DiT block's attention."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run

    def forward(self, q: Tensor, k: Tensor, v: Tensor, text: int) -> Tensor:
        run, dtype = self.run, q.dtype
        if run.dtype is not None:
            q, k, v = (x.to(run.dtype) for x in (q, k, v))
        tokens, layer = q.shape[1], None
        if run.call is not None:
            image = k[:, text:]
            # (B, N, d): the ViT paper's keys averaged over the heads; what matches nothing wants the shape alone.
            metric = image.mean(2) if run.call.config.kind.matches else image[:, :, 0]
            behind = run.joint is not None
            layer = run.call.attention(*(x[:, text:].flatten(2) for x in (q, k, v)), run.full, metric, behind)
        if layer is None:
            run.count(run.full, tokens, tokens, tokens)
            return _joint(q, k, v).to(dtype)
        if run.variant.tail:
            work = 1.0 - run.call.config.ratio
            run.count(run.full, tokens, tokens, text + round(work * (tokens - text)))
            given = (x.transpose(1, 2) for x in (q, k, v))
            out = attend_tails(*given, text, run.full, work, run.variant.tail)
            return out.transpose(1, 2).flatten(2).to(dtype)
        if behind:
            run.count(run.full, tokens, tokens, text + layer.plan.kept + run.call.config.keeps_self)
            out = run.attend_behind(*(x.transpose(1, 2) for x in (q, k, v)), text, layer.plan)
            return out.flatten(2).to(dtype)
        config = run.call.config
        if config.kind.queries:
            q = _beside(q[:, :text], layer.q)
        if config.kind.keys:
            k, v = _beside(k[:, :text], layer.k), _beside(v[:, :text], layer.v)
        # Even where all of the image's keys stand for as many, the text's do not: plan.sizes and not layer.bias.
        bias = F.pad(layer.plan.sizes.log(), (text, 0)) if config.weighs_keys else None  # (B, K)
        run.count(run.full, tokens, q.shape[1], k.shape[1])
        out = _joint(q, k, v, bias).to(dtype)
        return torch.cat((out[:, :text], layer.unmerge(out[:, text:])), dim=1) if config.kind.queries else out


class HeldAttention(nn.Module):
    """Stands in for an attention some of whose outputs are held for the steps that follow (reuse.Hold). What residuals
    are is the core's (merging/residual.py)."""

    def __init__(self, inner: MergedSelfAttention | MergedJointAttention, run: Run):
        super().__init__()
        self.inner, self.run = inner, run
        self.kept: Tensor | None = None

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """x: of self-attention tokens [B, N, C], of joint attention queries [B, L, H, d]."""
        run, tokens = self.run, x.shape[1]
        if run.held:
            joint = isinstance(self.inner, MergedJointAttention)
            run.count(run.full if joint else grid_of(tokens, run.full), tokens, 0, 0)
            return self.kept
        if run.residual is None:
            out = self.inner(x, *args)
            self.kept = out if run.keeps else self.kept
            return out

        def drawn() -> Tensor:
            with run.drawing() if run.call is None else nullcontext():
                return self.inner(x, *args)

        run.residual.begin(self, x, run.full)
        return run.residual.attend(self, drawn, lambda: self.inner(x, *args))


def _beside(text: Tensor, image: Tensor) -> Tensor:
    """text [B, T, H, d] and image [B, M, H * d] -> [B, T + M, H, d]."""
    return torch.cat((text, image.unflatten(2, text.shape[2:])), dim=1)


def _joint(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """q [B, L, H, d], k and v [B, K, H, d], bias [B, K] -> [B, L, H * d]."""
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), bias).transpose(1, 2).flatten(2)


def _refused(message: str, detail: str) -> None:
    """What is measured must be what its name says."""
    raise RuntimeError(f"{message}: {detail}")


def check(network: UNet | DiT, variant: Variant) -> None:
    """Raises ValueError for a variant that means nothing on this network."""
    config = variant.config
    if isinstance(network, DiT) and (config.cross_attention or config.mlp or config.levels != "0"):
        raise ValueError(
            f"{variant.name!r} cannot be measured on a DiT: it has one level, no cross-attention, and merges around "
            "its attention alone"
        )
    if variant.tiles and (isinstance(network, DiT) or variant.is_merged or variant.hold):
        raise ValueError(f"{variant.name!r} cannot be measured: tiles are cut in a U-Net that nothing else changes")
    if variant.hold and (variant.reuse or variant.config.kind.matches and variant.is_merged):
        raise ValueError(f"{variant.name!r} cannot be measured: attentions are held alone, or with drawn keys")


def _stand_ins(network: UNet | DiT, run: Run) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(block, its part's name, what is to take the part's place)."""

    def held(part: nn.Module) -> nn.Module:
        return HeldAttention(part, run) if run.variant.hold else part

    for block in network.modules():
        if isinstance(block, BasicTransformerBlock):
            yield block, "attn1", held(MergedSelfAttention(block.attn1, run))
            yield block, "attn2", MergedPart(block.attn2, run, "cross_attention")
            yield block, "ff", MergedPart(block.ff, run, "mlp")
        elif isinstance(getattr(block, "attention", None), JointAttention):
            yield block, "attention", held(MergedJointAttention(run))


@contextmanager
def merged(network: UNet | DiT, variant: Variant, dtype: torch.dtype | None = None) -> Iterator[Run]:
    """Puts a variant on a network, which is what it was when the block is left in whatever way. dtype: see Run."""
    check(network, variant)
    run = Run(variant, dtype)
    stand_ins = list(_stand_ins(network, run))
    plain = [getattr(block, name) for block, name, _ in stand_ins]
    try:
        for block, name, part in stand_ins:
            setattr(block, name, part)
        yield run
    finally:
        for (block, name, _), part in zip(stand_ins, plain, strict=True):
            setattr(block, name, part)
