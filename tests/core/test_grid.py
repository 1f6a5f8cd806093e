"""From token counts to grids and levels."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared_tome.core.grid import grid_at, grid_of, halve, level_of

sides = st.integers(1, 200)


def conv_out(size):
    """The output of a convolution with kernel 3, stride 2, padding 1."""
    return (size + 2 - 3) // 2 + 1


def test_halve():
    assert [halve(64, times) for times in range(4)] == [64, 32, 16, 8]
    assert [halve(41, times) for times in range(7)] == [41, 21, 11, 6, 3, 2, 1]


@given(sides, st.integers(0, 7))
def test_halve_is_the_convolutions_size(size, times):
    expected = size
    for _ in range(times):
        expected = conv_out(expected)
    assert halve(size, times) == expected


def test_264_by_328_pixels():
    full = (264 // 8, 328 // 8)
    for level, grid in enumerate([(33, 41), (17, 21), (9, 11), (5, 6)]):
        assert grid_at(full, level) == grid_of(grid[0] * grid[1], full) == grid
        assert level_of(grid, full) == level


def test_a_count_that_is_no_grid():
    assert grid_of(33 * 41 + 1, (33, 41)) is None
    assert grid_of(17 * 21 + 1, (33, 41)) is None
    assert grid_of(77, (64, 64)) is None
    assert grid_of(0, (64, 64)) is None
    assert grid_of(256, (64, 64), levels=2) is None and grid_of(256, (64, 64), levels=3) == (16, 16)


@given(sides, sides, st.integers(0, 7))
def test_grid_of_finds_what_grid_at_made(height, width, level):
    grid = grid_at((height, width), level)
    assert grid_of(grid[0] * grid[1], (height, width)) == grid


@given(sides, sides, st.integers(0, 4))
def test_level_of_finds_what_grid_at_made(height, width, level):
    """The lowest level with as many tokens: small grids stop shrinking."""
    full = (height, width)
    grid = grid_at(full, level)
    lowest = next(other for other in range(8) if grid_at(full, other) == grid)
    assert level_of(grid, full) == lowest


def test_level_of_lines_and_small_grids():
    assert [level_of((1, size), (1, 64)) for size in (64, 32, 16, 8)] == [0, 1, 2, 3]
    assert [level_of((size, size), (5, 5)) for size in (5, 3, 2, 1)] == [0, 1, 2, 3]


def test_level_of_grids_between_two_levels():
    full = (96, 96)
    assert [level_of((size, size), full) for size in (80, 70, 66, 48, 40, 24)] == [0, 0, 1, 1, 1, 2]
    assert level_of((120, 120), full) == 0
