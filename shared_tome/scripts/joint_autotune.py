"""Whether merging pays in an attention of a diffusers transformer, as comfy_tome/dit.py asks in ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..attention.combine import TORCHS
from ..attention.sdpa import HostAttention, attend_sampled
from ..attention.sequence import JointCall
from ..autotune.decision_log import DecisionLog
from ..autotune.layer import known_or_measured, measures, name_of, ways
from ..autotune.paying import Decision, Given, Judge
from ..autotune.timing import compared
from ..core.curve import is_compiling
from ..core.grid import Grid
from ..merging.call import ModelCall
from .parallel import ELSEWHERE, Shard

# Text and reference tokens of two calls that differ by less count as equally many.
_OTHERS = 256


@dataclass(eq=False)
class JointDecisions:
    """Of one call of a transformer, owned by it. model: its class's name. shard: this process's part, where several
    share the call. log: what is told of them. judge: by what is known of the call's whole step."""

    call: ModelCall
    grid: Grid
    model: str
    shard: Shard | None = None
    log: DecisionLog = field(default_factory=DecisionLog)
    judge: Judge = field(default_factory=Judge)
    _unpaid: dict[tuple, str | None] = field(default_factory=dict)

    def why_not_paid(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor, start: int) -> str | None:
        """Why an attention is left alone because of its times, or None. q, k, v: [B, H, L, d]; the image begins at
        `start`.

        Measured at its first use on its first row, whatever the batch and a few words in the prompt are. Methods that
        match are not measured, nor attentions with a mask, nor anything while torch.compile traces.
        """
        config = self.call.config
        if config.kind.matches or attention.mask is not None or is_compiling():
            return None
        heads = q.shape[1] if self.shard is None else self.shard.heads
        layer = self.grid, heads * q.shape[3], heads
        others = -(-(q.shape[2] - math.prod(self.grid)) // _OTHERS)
        shape = (self.grid, others, q.shape[1], q.shape[3], q.dtype)
        if shape not in self._unpaid:
            known = self.log.layer(config, *layer, others * _OTHERS)
            if known is None and measures(config, self.grid, q.device):
                names = [
                    self.model,
                    name_of(None, q.device),
                    *TORCHS,
                    *map(str, shape),
                    *ways(config, config.keeps_self),
                ]
                timed = self._timed(attention, q[:1], k[:1], v[:1], start)
                known = known_or_measured(", ".join(names), q.device, timed)
            why = self._unpaid[shape] = self._why((shape, *layer, *ways(config, config.keeps_self)), known)
            self.log.made_layer(config, *layer, known, why is None, others * _OTHERS)
        return self._unpaid[shape]

    def _why(self, layer: tuple, found: Decision | Given | None) -> str | None:
        """Why a layer of this decision is left alone, or None: where one process leaves it alone, all do."""
        if self.shard is None:
            self.judge.meet(found)
            return self.judge.why_not_paid(found)
        mine = [found is None or found.pays(waits) for waits in (True, False)]
        waiting, busy = self.shard.agree(layer, mine)
        self.judge.matters |= busy and not waiting
        pays = waiting if self.judge.waits else busy
        return None if pays else self.judge.why_not_paid(found) or ELSEWHERE

    def _timed(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor, start: int) -> Callable[[], Decision]:
        """What measures one row. Its draws are its own: those of the call stay what they are."""

        def measure() -> Decision:
            config = self.call.config
            plan = ModelCall(config, self.grid, q.device).plan(q.new_empty(1, math.prod(self.grid), 1), self.grid)
            if plan is None:
                return Decision(0.0, 0.0, 0.0)
            joint = JointCall(config.weighs_keys, TORCHS, lambda *_: None, config.keeps_self)
            return compared(
                lambda: attention(q, k, v), lambda: attend_sampled(joint, attention, q, k, v, start, plan), q.device
            )

        return measure
