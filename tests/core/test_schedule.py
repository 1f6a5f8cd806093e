"""Which layers, which steps, how many tokens."""

from __future__ import annotations

import pytest
import torch

from shared_tome import ToMeConfig
from shared_tome.core.grid import grid_at
from shared_tome.core.schedule import RATIOS, ratio_at, serves_layer

from .helpers import config


def ratios(steps, **options):
    """The ratio at each of some steps, as a host asks for it."""
    made = config(**options)
    return [round(ratio_at(made, step / steps), 6) for step in range(steps)]


def test_without_a_schedule():
    assert ratios(4, ratio=0.6) == [0.6] * 4
    assert ratio_at(config(ratio=0.6), 1.0) == 0.6


def test_start_and_end():
    assert ratios(10, ratio=0.6, start=0.4) == [0] * 4 + [0.6] * 6
    assert ratios(10, ratio=0.6, end=0.5) == [0.6] * 5 + [0] * 5
    assert ratios(10, ratio=0.6, start=0.2, end=0.3) == [0, 0, 0.6] + [0] * 7
    assert ratios(10, ratio=0.6, start=0.2, end=0.2) == [0] * 10
    assert ratio_at(config(ratio=0.6, end=0.5), 1.0) == 0.0
    assert ratio_at(config(ratio=0.6, start=0.4), 1.0) == 0.6


def test_a_moving_ratio_goes_in_stages():
    assert ratios(6, ratio=0.8, ratio_end=0.3) == [0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    assert ratios(12, ratio=0.0, ratio_end=0.5) == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5]
    assert ratios(4, ratio=0.8, ratio_end=0.0) == [0.8, 0.64, 0.32, 0.16]
    assert ratios(10, ratio=0.7, ratio_end=0.2, start=0.2, end=0.8) == [0, 0, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0, 0]
    assert ratio_at(config(ratio=0.6, ratio_end=0.2), 1.0) == pytest.approx(0.2)
    assert ratio_at(config(ratio=0.6, ratio_end=0.2), 1.5) == pytest.approx(0.2)
    assert ratio_at(config(ratio=0.6, ratio_end=0.2, start=1.0), 1.0) == 0.6


def test_a_moving_ratio_takes_few_values():
    """Each is another graph under torch.compile, which gives up after a few."""
    found = set(ratios(1000, ratio=0.9, ratio_end=0.1, start=0.1, end=0.95))
    assert len(found) == RATIOS + 1 < torch._dynamo.config.recompile_limit
    assert {0.0, 0.1, 0.9} <= found


def test_a_ratio_of_any_step_is_a_ratio():
    for start, end in ((0.0, 1.0), (0.3, 0.3), (0.1, 0.7)):
        made = config(ratio=0.9, ratio_end=0.1, start=start, end=end)
        for step in range(-5, 120):
            made.replace(ratio=ratio_at(made, step / 100), ratio_end=-1.0)


def served(options, grids, full):
    return [serves_layer(ToMeConfig(**options), grid, full) for grid in grids]


def test_levels():
    full = (33, 41)
    grids = [grid_at(full, level) for level in range(4)]
    for level in range(4):
        options = {"levels": level, "min_tokens": 0}
        assert served(options, grids, full) == [other == level for other in range(4)]
    assert served({"levels": "0,2", "min_tokens": 0}, grids, full) == [True, False, True, False]
    assert served({"levels": "auto", "min_tokens": 0}, grids, full) == [True] * 4


def test_auto_takes_the_layers_with_enough_tokens():
    sd15, sdxl = (64, 64), (128, 128)
    assert served({}, [grid_at(sd15, level) for level in range(4)], sd15) == [True, False, False, False]
    assert served({}, [grid_at(sdxl, level) for level in range(1, 3)], sdxl) == [True, False]
    assert served({"min_tokens": 1024}, [grid_at(sdxl, level) for level in range(1, 4)], sdxl) == [True, True, False]


def test_min_tokens_is_the_least():
    assert served({"min_tokens": 64}, [(8, 8), (7, 9)], (8, 8)) == [True, False]
    assert served({"min_tokens": 0}, [(1, 1), (1, 2)], (8, 8)) == [False, True]
    assert served({"min_tokens": 64, "levels": "0"}, [(8, 8)], (9, 8)) == [True]
    assert served({"min_tokens": 65, "levels": "0"}, [(8, 8)], (8, 8)) == [False]


def test_deep_shrink():
    """It halves inside the U-Net by any factor: a layer counts to the level with the nearest number of tokens."""
    full = (96, 96)
    options = {"levels": "0", "min_tokens": 0}
    assert served(options, [(80, 80), (48, 48)], full) == [True, False]  # by 1.2 and by 2.0
    options["levels"] = "1"
    assert served(options, [(80, 80), (48, 48), (40, 40), (24, 24)], full) == [False, True, True, False]
