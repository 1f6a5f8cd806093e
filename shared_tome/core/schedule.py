"""Which layers, which steps, how many tokens: pure functions of the config.

Sources: Bolya and Hoffman (arXiv 2303.17604), Table 3b (levels) and Table 3c (schedules over the steps).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..config import ToMeConfig
from .grid import Grid, level_of

# Values that a moving ratio takes. Each is another number of tokens, so another graph under torch.compile, which
# gives up after eight; the unmerged steps of a start or an end are one more.
RATIOS = 6


def ratio_at(config: ToMeConfig, progress: float) -> float:
    """The ratio at a point of the run, 0 where nothing is merged. A moving one goes in RATIOS equal stages.

    progress: 0 at the first step, towards 1 at the last (step / steps).
    """
    if not config.start <= progress or (progress >= config.end and config.end < 1.0):
        return 0.0
    if config.ratio_end < 0.0:
        return config.ratio
    way = (progress - config.start) / (config.end - config.start) if config.end > config.start else 0.0
    stage = min(RATIOS - 1, math.floor(RATIOS * max(0.0, way) + 1e-9))
    return config.ratio + (config.ratio_end - config.ratio) * stage / (RATIOS - 1)


def config_at(config: ToMeConfig, progress: Callable[[], float]) -> ToMeConfig:
    """The config with the ratio of one step.

    progress: asked only where there is a schedule, since knowing it may cost a host a synchronisation.
    """
    return config.replace(ratio=ratio_at(config, progress()), ratio_end=-1.0) if config.is_scheduled else config


def is_settled(config: ToMeConfig, progress: float) -> bool:
    """Whether the ratio is the same from this progress on."""
    if progress >= config.end and config.end < 1.0:
        return True
    return progress >= config.start and config.end >= 1.0 and config.ratio_end < 0.0


def serves_layer(config: ToMeConfig, grid: Grid, full: Grid) -> bool:
    """Whether a layer on this grid is to be merged; full: the latent's own grid."""
    if math.prod(grid) < max(2, config.min_tokens):
        return False
    levels = config.level_set
    return levels is None or level_of(grid, full) in levels
