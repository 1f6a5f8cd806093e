"""Every option of ToMe, once: name, default, range, label and help text.

The ComfyUI node, the AUTOMATIC1111 panel, the settings page and the command line are made from
`ToMeConfig.widgets()`; nobody repeats a range or a text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .decided import Decided, parse
from .decided import checked as checked_decisions
from .methods import (
    AUTO,
    AUTO_MOST,
    CUSTOM,
    LEVELS,
    MAX_RUN,
    MAX_SEED,
    METHODS,
    PARTITIONS,
    PRESETS,
    QUARTER,
    REDUCES,
    Method,
    idle_options,
)
from .options import Option, Widget, check_together, checked, lines, option, widgets_of


@dataclass(frozen=True)
class ToMeConfig:
    """All that can be chosen. Immutable; a value out of range raises ValueError naming it.

    Tokens x [B, N, C] lie on a grid (height, width), N = height * width.
    """

    ratio: float = option(
        0.75,
        "Ratio",
        "The share of the tokens that attention does without. 0 changes nothing; 0.5 is hard to see; 0.75 keeps "
        "lettering and texture mostly; 0.9375 is fast on large pictures, and details change. Fastest where cells are "
        "of equal size: 0.5, 0.75, 0.875, 0.9375. Methods that match can take at most 1 - 1/(stride x * stride y).",
        minimum=0.0,
        maximum=1.0,
        step=0.0125,
        brief="Share of the tokens that attention does without. 0.5 is hard to see, 0.9375 is fast.",
    )
    stride: tuple[int, int] = option(
        (2, 2),
        "Stride",
        "Width and height, in tokens, of the cell that keeps one destination token. sample goes by the ratio alone.",
        minimum=1,
        maximum=8,
        step=1,
        parts=("x", "y"),
        brief="The cell that keeps one destination token, in tokens. For methods that match.",
    )
    method: str = option(
        "sample",
        "Method",
        "auto: multires on transformers where its kernel runs (CUDA), sample elsewhere.\n" + lines(METHODS),
        choices=(AUTO, *METHODS),
        new=AUTO,
        brief="How tokens are merged. auto is the nearest to the unmerged picture.",
    )
    seed: int = option(
        0,
        "Seed",
        "Random choices depend on this number, the step and the layer alone: the same seed gives the same picture.",
        minimum=0,
        maximum=MAX_SEED,
        step=1,
        brief="The same number gives the same random choices, and so the same picture.",
    )
    partition: str = option(
        "random_2d",
        "Partition",
        "Where destination tokens lie, for the methods that match.\n" + lines(PARTITIONS),
        choices=tuple(PARTITIONS),
        advanced=True,
    )
    levels: str = option(
        "auto",
        "Levels",
        "At which resolutions to merge: 0 is the latent's own, each further level has half the width and height. "
        "auto takes every layer that has at least 'min tokens' and that, on a GPU, is faster merged (measured once); "
        "named levels are always merged.",
        choices=LEVELS,
        advanced=True,
        brief="Which resolutions are merged. auto: those where it is faster; named ones always are.",
    )
    start: float = option(
        0.0,
        "Start",
        "Where merging begins, by noise: 0 is pure noise, 1 the picture, like the start percent of other nodes. With "
        "even schedulers (normal, simple) it is the share of the steps. The first steps decide the composition: "
        "leaving them alone costs that share of the gain and keeps the picture much nearer to the unmerged one.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
        advanced=True,
        brief="Where merging begins, by noise: 0 is pure noise, 1 the picture. Later is nearer to unmerged.",
    )
    end: float = option(
        1.0,
        "End",
        "Where merging stops, by noise: 0 is pure noise, 1 the picture.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
        advanced=True,
    )
    ratio_end: float = option(
        -1.0,
        "Ratio at the end",
        "The ratio moves in six equal stages from 'ratio' to this value between start and end. -1: it stays.",
        minimum=-1.0,
        maximum=1.0,
        step=0.05,
        advanced=True,
    )
    cross_attention: bool = option(
        False,
        "Cross-attention",
        "Merge the queries of the attention to the prompt too. For methods that match. Costs fidelity, gains little.",
        advanced=True,
        brief="Merge the queries to the prompt too. For methods that match. Gains little.",
    )
    mlp: bool = option(
        False,
        "MLP",
        "Merge the tokens of the feed-forward layers too. For methods that match. Costs much fidelity.",
        advanced=True,
    )
    proportional: bool = option(
        True,
        "Proportional attention",
        "A key that stands for several tokens weighs as much as they did. Nearer to the unmerged picture.",
        advanced=True,
    )
    reduce: str = option(
        "mean",
        "Reduce",
        "What value a merged token takes.\n" + lines(REDUCES),
        choices=tuple(REDUCES),
        advanced=True,
    )
    min_tokens: int = option(
        2048,
        "Min tokens",
        "Layers with fewer tokens are left alone: their attention costs less than merging it.",
        minimum=0,
        maximum=2**20,
        step=16,
        advanced=True,
    )
    share_match: bool = option(
        False,
        "Share match",
        "Look for similar tokens once for the prompted and unprompted rows of a batch: half the matching. The "
        "picture then depends a little on whether the host runs both in one batch.",
        advanced=True,
        brief="One match for the prompted and unprompted rows of a batch: half the matching.",
    )
    # New options go to the end: saved workflows and API calls tell them by their place.
    own_token: bool = option(
        True,
        "Own token",
        "sample: beside the drawn tokens each token attends to itself, so that lettering and the finest texture stay. "
        "Takes a little time, and needs PyTorch's attention.",
        advanced=True,
        brief="sample: each token attends to itself too, so that texture stays. Needs PyTorch's attention.",
    )
    whole: float = option(
        -1.0,
        "Share whole",
        "multires: the share of the keys' tiles that stay whole, 0 to 1. -1: what the ratio sets.",
        minimum=-1.0,
        maximum=1.0,
        step=0.01,
        advanced=True,
    )
    half: float = option(
        -1.0,
        "Share at half",
        "multires: the share of the keys' tiles at half resolution, a quarter of their tokens, 0 to 1. -1: what the "
        "ratio sets. The rest is at quarter resolution; whole and half add up to 1 at most.",
        minimum=-1.0,
        maximum=1.0,
        step=0.01,
        advanced=True,
        brief="multires: the share of the keys' tiles at half resolution, 0 to 1. -1: by the ratio.",
    )
    decisions: str = option(
        "",
        "Decisions",
        "What autotune decided in an earlier run, as the node's line and ToMe Report tell it. These steps and layers "
        "are merged (+) or left alone (-) whatever they cost here, so that the picture is the same on another GPU. "
        "What is not named is measured. Empty: autotune decides. Needs 'levels' auto.",
        advanced=True,
        check=checked_decisions,
        brief="What autotune decided in an earlier run: the same layers are merged. Empty: it decides anew.",
    )
    exact_every: int = option(
        0,
        "Exact every",
        "sample and downsample, on U-Nets: of the merged steps the first and then every n-th are exact, and the steps "
        "between add what their attention lacked there. 0: off, else 2 to 16. Much nearer to the unmerged picture, for "
        "a part of the time saved and some memory. For large pictures (2048 x 2048). Outside ComfyUI it needs "
        "PyTorch's attention.",
        minimum=0,
        maximum=16,
        step=1,
        advanced=True,
        brief="U-Nets: every n-th merged step is exact, and those between add what they lack. 0: off.",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        object.__setattr__(self, "_decided", parse(self.decisions))  # here: torch.compile cannot trace the reading
        check_together(self)

    @property
    def decided(self) -> Decided:
        """What `decisions` says."""
        return self._decided

    @property
    def preset(self) -> str:
        """The name of the preset that these options are, or CUSTOM. sample counts as auto, which it is on U-Nets."""
        ours = self.resolved(multires=False)
        found = (name for name, preset in PRESETS.items() if ours == ours.replace(**preset.options).resolved(False))
        return next(found, CUSTOM)

    @property
    def kind(self) -> Method:
        """The method's row of METHODS; auto is sample until it is resolved."""
        return METHODS["sample" if self.method == AUTO else self.method]

    def resolved(self, multires: bool) -> ToMeConfig:
        """With a method in place of auto: the one that `decisions` names, else by `multires`, which says whether the
        model is a transformer and the kernel runs. There auto leaves at least a share of 1 - AUTO_MOST of the work, or
        the picture would go to pieces (docs/quality.md)."""
        if self.method != AUTO:
            return self
        method = self.decided.method or ("multires" if multires else "sample")
        if method != "multires":
            return self.replace(method=method)
        ratio, ratio_end = min(self.ratio, AUTO_MOST), min(self.ratio_end, AUTO_MOST)
        return self.replace(method="multires", ratio=ratio, ratio_end=ratio_end)

    def why_less(self, resolved: ToMeConfig) -> str | None:
        """What to say where resolved took less than the ratio that was asked for, or None."""
        if (self.ratio, self.ratio_end) == (resolved.ratio, resolved.ratio_end):
            return None
        asked = self.ratio if self.ratio != resolved.ratio else self.ratio_end
        return (
            f"on a transformer auto takes at most ratio {AUTO_MOST:g}, in place of {asked:g}; for more name the method "
            "multires"
        )

    @property
    def is_off(self) -> bool:
        """Whether nothing is ever merged."""
        return (self.ratio == 0.0 and self.ratio_end <= 0.0) or self.start == self.end

    @property
    def weighs_keys(self) -> bool:
        """Whether a key that stands for several tokens is to weigh as much as they did."""
        return self.proportional and self.kind.keys and not self.kind.fills

    @property
    def samples(self) -> bool:
        """Whether keys are drawn, another one in every layer and step."""
        return self.method in (AUTO, "sample", "multires")

    @property
    def shares_by_hand(self) -> bool:
        """Whether a share of multires is set by hand, so that the ratio does not say all."""
        return self.method == "multires" and max(self.whole, self.half) >= 0.0

    @property
    def keeps_self(self) -> bool:
        """Whether each query is to have its own token among the drawn ones (core/self_token.py)."""
        return self.own_token and self.samples and self.weighs_keys

    @property
    def keeps_exact(self) -> bool:
        """Whether some steps are exact, and what drawn attentions lack is kept for the others (merging/residual.py)."""
        return self.exact_every > 0 and "exact_every" not in idle_options(self.method)

    @property
    def wants_heads(self) -> bool:
        """Whether the attention is to see the heads of all tokens (attention/sequence.py)."""
        return self.keeps_self or self.method == "multires"

    @property
    def is_scheduled(self) -> bool:
        """Whether what is done depends on the step (and the host must know where it is)."""
        return self.start > 0.0 or self.end < 1.0 or self.ratio_end >= 0.0

    @property
    def level_set(self) -> frozenset[int] | None:
        """The levels named by `levels`, or None for auto."""
        return None if self.levels == "auto" else frozenset(int(part) for part in self.levels.split(","))

    @property
    def ratio_cap(self) -> float:
        """The highest ratio that the method can reach on a grid that divides by the stride."""
        if self.samples:
            return 1.0 - 1.0 / (QUARTER if self.method == "multires" else MAX_RUN)
        if self.kind.matches and self.partition == "alternate":
            return 0.5
        return 1.0 - 1.0 / (self.stride[0] * self.stride[1])

    def replace(self, **changes: Any) -> ToMeConfig:
        """A copy with some options changed, checked again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Every option by its name."""
        return {field.name: field.metadata["option"] for field in dataclasses.fields(cls)}

    @classmethod
    def widgets(cls) -> list[Widget]:
        """The controls of a user interface, in order; `stride` becomes stride_x and stride_y."""
        return widgets_of(dataclasses.fields(cls))

    @classmethod
    def from_widgets(cls, **values: Any) -> ToMeConfig:
        """The config for a user interface's values; those not given keep their defaults.

        Raises ValueError for an unknown name or a value out of range.
        """
        known = {widget.name: widget.unnamed for widget in cls.widgets()}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown ToMe option {unknown[0]!r}; there are {', '.join(known)}")
        known.update(values)
        for field in dataclasses.fields(cls):
            parts = field.metadata["option"].parts
            if parts:
                known[field.name] = tuple(known.pop(f"{field.name}_{part}") for part in parts)
        return cls(**known)
