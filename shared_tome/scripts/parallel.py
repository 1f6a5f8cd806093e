"""One picture on several GPUs: diffusers' context parallelism (`enable_parallelism`, on torch.distributed).

With Ulysses each process has a part of every sequence, and in the attention all tokens of a part of the heads (Jacobs
et al., arXiv 2309.14509, section 3). There ToMe works as in one process: the tokens are put in the order that they have
there, each head draws what it draws there, and similarity is measured on the keys of all processes' heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.sdpa import Handler, HostAttention
from ..merging.plan import Plan, SamplePlan
from .rows import Place


def why_not_parallel(model: nn.Module) -> str | None:
    """Why a model that is run on several GPUs in this way is left alone, or None."""
    config = getattr(model, "_parallel_config", None)
    if config is None:
        return None
    name, context = type(model).__name__, getattr(config, "context_parallel_config", None)
    if context is None:
        return f"{name} is tensor-parallel: each process has the keys of some heads alone"
    if context.ring_degree > 1:
        return (
            f"{name} has ring attention (ring_degree={context.ring_degree}), which does not call torch's attention, "
            "where ToMe works; choose ulysses_degree"
        )
    if getattr(type(model), "_cp_plan", None) is None:
        return f"{name} has a cp_plan that is not diffusers' own: in what order its tokens meet is not known"
    return None


def rejoin(module: nn.Module, made: nn.Module) -> bool:
    """Put on a copy of a module what cuts and gathers tokens for the processes (diffusers' ModelHook). False where
    something else stands in the place of its forward, too."""
    registry = getattr(module, "_diffusers_hook", None)
    hooks, first = getattr(registry, "hooks", {}), next(iter(getattr(registry, "_fn_refs", ())), None)
    is_own = getattr(getattr(first, "forward", None), "__func__", None) is type(module).forward
    placed = getattr(module.__dict__.get("forward"), "func", None)
    if not is_own or getattr(placed, "__module__", None) != type(registry).__module__:
        return False
    if any(not type(hook).__name__.startswith("ContextParallel") for hook in hooks.values()):
        return False
    made._diffusers_hook = type(registry)(made)
    for name, hook in hooks.items():
        made._diffusers_hook.register_hook(copy.copy(hook), name)
    return True


ELSEWHERE = "merging does not pay in another of the processes that share the model"


@dataclass(eq=False)
class Shard:
    """One process's part of the attentions of a call.

    group, rank, count: of the processes that share it. device: where they talk. order: [L], where each token that the
    attention has stands in one process's; None: in its place. places: its inverse. agreed: what was decided together of
    layers, for all calls of the model. heads: of the layer that runs now, in all processes together.
    """

    group: Any
    rank: int
    count: int
    device: torch.device
    order: Tensor | None
    places: Tensor | None
    agreed: dict[Hashable, list[bool]]
    heads: int = 0

    @classmethod
    def of(cls, model: nn.Module, place: Place, agreed: dict[Hashable, list[bool]]) -> Shard | None:
        """None where one process has it all. The text before the image, and the image with what is behind it, are each
        cut by the number of processes."""
        context = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
        if context is None:
            return None
        every = torch.arange(place.head + math.prod(place.grid) + place.tail, device=place.latent.device)
        parts = [part.tensor_split(context.ulysses_degree) for part in (every[: place.head], every[place.head :])]
        order = None if place.head == 0 else torch.cat([x for pair in zip(*parts, strict=True) for x in pair])
        places = None if order is None else order.argsort()
        group = context._ulysses_mesh.get_group()
        rank, count = context._ulysses_local_rank, context.ulysses_degree
        return cls(group, rank, count, place.latent.device, order, places, agreed)

    def attend(self, attend: Handler, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """attend, in the order of one process; q, k, v: [B, h, L, d] of this process's heads."""
        places = self.places
        if places is None or k.shape[2] != len(places) or q.shape[2] != len(places):
            return attend(attention, q, k, v)
        q, k, v = (x.index_select(2, places) for x in (q, k, v))
        mask = attention.mask
        if mask is not None and mask.shape[-1] == len(places):
            mask = mask.index_select(-1, places)
        return attend(HostAttention(attention.func, attention.options, mask), q, k, v).index_select(2, self.order)

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """What each process has, by rank. Waits for the device."""
        mine = torch.tensor([float(x) for x in numbers], dtype=torch.float64, device=self.device)
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        torch.distributed.all_gather(parts, mine, group=self.group)
        return [part.tolist() for part in parts]

    def agree(self, layer: Hashable, answers: Sequence[bool]) -> list[bool]:
        """What all processes answer with yes of a layer.

        layer: what tells it from others; all processes meet the layers in the same order. answers: this process's own.
        Waits for the device, once for a layer.
        """
        if layer not in self.agreed:
            self.agreed[layer] = [all(each) for each in zip(*self.gather(answers), strict=True)]
        return self.agreed[layer]

    def mean(self, k: Tensor) -> Tensor:
        """k [B, h, N, d] averaged over all processes' heads: [B, N, d], the same in each process."""
        total = k.sum(1, dtype=torch.float32).contiguous()
        torch.distributed.all_reduce(total, group=self.group)
        return (total / self.heads).to(k.dtype)

    def of_heads(self, plan: Plan) -> Plan:
        """A plan for this process's heads; the last process may have fewer than the others."""
        first = self.rank * -(-self.heads // self.count)
        return plan.from_head(first) if isinstance(plan, SamplePlan) else plan
