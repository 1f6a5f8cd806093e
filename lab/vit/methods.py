"""Ways to have r tokens fewer in a block, for comparison with bipartite matching (the ViT paper's Table 1).

Each is an Attachment (shared_tome/vit/hooks.py) that decides otherwise; hooks, weights and schedules are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared_tome.merging.plan import MergePlan, Plan
from shared_tome.vit.hooks import VitAttachment, VitCall, attach
from shared_tome.vit.options import Options

SEED = 505


class RandomPruning(VitAttachment):
    """Random patches go and leave nothing behind."""

    def begin(self, x: Tensor) -> None:
        self.generator = torch.Generator(x.device).manual_seed(SEED)
        super().begin(x)

    def importance(self, metric: Tensor, prefix: int) -> Tensor:
        """How much each patch counts, [B, N - prefix]: the least important go."""
        shape = (metric.shape[0], metric.shape[1] - prefix)
        return torch.rand(shape, generator=self.generator, device=metric.device)

    def match(self, metric: Tensor, prefix: int, goes: int) -> Plan:
        batch, tokens, _ = metric.shape
        stays = self.importance(metric, prefix).topk(tokens - prefix - goes, dim=1).indices
        first = torch.arange(prefix, device=metric.device).expand(batch, -1)
        index = torch.cat((first, stays.sort(dim=1).values + prefix), dim=1)
        own = torch.arange(index.shape[1], device=metric.device).expand(batch, -1)
        # Those that go are counted with token 0, which keeps its own value.
        groups = torch.zeros((batch, tokens), dtype=torch.int64, device=metric.device).scatter(1, index, own)
        return MergePlan(batch, index, groups, mean=False)


class Pruning(RandomPruning):
    """The patches to which the class token attends least go. Needs a class token."""

    def metric(self, q: Tensor, k: Tensor) -> Tensor:
        logits = q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, H, 1, M)
        return logits.detach().float().softmax(dim=-1).mean(dim=1).transpose(1, 2)  # (B, M, 1)

    def importance(self, metric: Tensor, prefix: int) -> Tensor:
        return metric[:, prefix:, 0]


class SlicedCall(VitCall):
    """Takes the first tokens and forgets the others."""

    def merge(self, x: Tensor, goes: int) -> Tensor | None:
        self.metric = None
        goes = min(goes, (x.shape[1] - self.prefix) // 2)
        return x[:, : x.shape[1] - goes] if goes > 0 else None


class Sliced(VitAttachment):
    """As many tokens fewer at no cost: how fast any method could be. Its outputs mean nothing."""

    call_type = SlicedCall

    def metric(self, q: Tensor, k: Tensor) -> Tensor:
        return k


METHODS: dict[str, type[VitAttachment]] = {
    "bipartite": VitAttachment,
    "bipartite, unweighted": VitAttachment,
    "pruning by attention": Pruning,
    "random pruning": RandomPruning,
    "limit": Sliced,
}
# Sizes count as weights of keys in all but these: what is pruned weighs nothing.
UNWEIGHTED = ("bipartite, unweighted", "pruning by attention", "random pruning")


def apply(model: nn.Module, method: str, r: int | list[int], schedule: str = "constant") -> None:
    """Put a method on a model that reads its class token, in place of what was on it."""
    options = Options(r=r, schedule=schedule, proportional=method not in UNWEIGHTED, restore="none")
    attach(model, options, METHODS[method])


def late(r: int, depth: int) -> list[int]:
    """A list for r: nothing in the first third of the blocks, the same sum in equal parts in the others."""
    start = depth // 3
    after, total = depth - start, r * depth
    edges = [total * i // after for i in range(after + 1)]
    return [0] * start + [b - a for a, b in zip(edges, edges[1:], strict=False)]
