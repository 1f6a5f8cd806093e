"""What was measured of a layer or of a step, and whether merging pays by it; or what is given in its place."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

# Merging must save this share of the layer: what is measured scatters by a few percent.
MARGIN = 0.03


@dataclass(frozen=True)
class Decision:
    """What was measured, microseconds of one layer: on the GPU whole and merged, and what merging takes the
    processor longer, which counts where steps wait for it.

    block_us, block_cpu_us: the layer's whole block unmerged, of the GPU and of the processor; 0 where not known.
    busy: of a step: its GPU has work however long merged layers take the processor, so that their time on it decides.
    """

    full_us: float
    merged_us: float
    cpu_us: float
    block_us: float = 0.0
    block_cpu_us: float = 0.0
    busy: bool = False

    def pays(self, waits: bool = True) -> bool:
        """Whether the layer is to be merged. waits: for the processor, as steps without a compiled graph do."""
        return self.saves_us > MARGIN * self.full_us and not (waits and self._waits)

    @property
    def _waits(self) -> bool:
        """Whether the processor would need longer for a merged block than the GPU does for an unmerged one; where no
        block is known, longer than is saved."""
        if self.block_us > 0.0:
            return self.block_cpu_us + self.cpu_us >= self.block_us
        return self.cpu_us >= self.saves_us

    @property
    def saves_us(self) -> float:
        return self.full_us - self.merged_us

    @functools.cached_property
    def reason(self) -> str:
        """Why a layer is left alone, for people."""
        if self.block_us > 0.0 and self._waits and self.saves_us > MARGIN * self.full_us:
            return (
                f"merging does not pay here: a block takes the processor {self.block_cpu_us:.0f} us and the GPU "
                f"{self.block_us:.0f}, so its steps wait for the processor"
            )
        return (
            f"merging does not pay here: it saves {self.saves_us:.0f} of {self.full_us:.0f} us and takes the processor "
            f"{self.cpu_us:.0f} us longer"
        )

    def rounded(self) -> Decision:
        """As a file has it: the process that measured and those that read the file must decide alike."""
        return Decision(**{name: x if name == "busy" else round(float(x), 2) for name, x in asdict(self).items()})


AS_SET = "the decisions that are set leave it alone"


@dataclass(frozen=True)
class Given:
    """In a decision's place where the option `decisions` says what is done, and nothing is measured."""

    merged: bool
    reason: str = AS_SET
    saves_us: float | None = None
    busy: bool = False

    def pays(self, waits: bool = True) -> bool:
        return self.merged


@dataclass
class Judge:
    """Judges the layers of a call or of more. waits: whether these are steps that wait for the processor. matters:
    whether that decided about a layer that was met: it would save the GPU time."""

    waits: bool = True
    matters: bool = False

    def why_not_paid(self, found: Decision | Given | None) -> str | None:
        """Why a layer of this decision is left alone although the options would have it merged, or None."""
        return None if found is None or found.pays(self.waits) else found.reason

    def meet(self, found: Decision | Given | None) -> None:
        """A layer was decided."""
        self.matters |= found is not None and found.pays(waits=False) and not found.pays()
