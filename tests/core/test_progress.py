"""How far a sampler is and which draw belongs there, told by noise levels alone."""

from __future__ import annotations

import pytest
import torch

from shared_tome.core.progress import Draws, percent_of, percent_of_level, percent_of_time, percent_table, place_of

# As Stable Diffusion's: log-linear is near enough; a flow's levels are shifted time.
LOW, HIGH = 0.03, 14.6


def diffusion(percent: float) -> float:
    """As ComfyUI's: numbers beyond the levels at both ends."""
    if not 0.0 < percent < 1.0:
        return 999999999.9 if percent <= 0.0 else 0.0
    return LOW * (HIGH / LOW) ** (1.0 - percent)


def shifted(percent: float) -> float:
    rest = 1.0 - percent
    return 8.0 * rest / (1.0 + 7.0 * rest)


def levels_at(percents, to_sigma=diffusion) -> torch.Tensor:
    """A sampler's list at these percents, with the 0 at its end."""
    return torch.tensor([*(to_sigma(min(max(p, 1e-7), 1 - 1e-7)) for p in percents), 0.0])


def uniform(steps: int, to_sigma=diffusion) -> torch.Tensor:
    """Alike in time, as ComfyUI's sgm_uniform: percents 0, 1/steps, 2/steps ..."""
    return levels_at([number / steps for number in range(steps)], to_sigma)


def karras(steps: int) -> torch.Tensor:
    """Karras et al., "Elucidating the design space of diffusion-based generative models" (2022), equation 5."""
    ramp = torch.linspace(0, 1, steps)
    return torch.cat(((HIGH ** (1 / 7) + ramp * (LOW ** (1 / 7) - HIGH ** (1 / 7))) ** 7, torch.zeros(1)))


def exponential(steps: int) -> torch.Tensor:
    """Alike in the logarithm. (With these percents that is alike in time, but not in their share.)"""
    return torch.cat((torch.linspace(1, 0, steps).mul(torch.tensor(HIGH / 0.2).log()).exp() * 0.2, torch.zeros(1)))


def jagged(steps: int) -> torch.Tensor:
    """Steps of any size."""
    ramp = torch.rand(steps, generator=torch.Generator().manual_seed(steps)).sort().values
    return levels_at(ramp.tolist())


def draws_of(levels: torch.Tensor, to_sigma=diffusion) -> Draws:
    return Draws.of(levels, percent_table(to_sigma))


def numbers(levels: torch.Tensor, asked, to_sigma=diffusion) -> list[int]:
    draws = draws_of(levels, to_sigma)
    return [int(draws.number(level)) for level in asked]


@pytest.mark.parametrize("to_sigma", [diffusion, shifted])
def test_percent_undoes_percent_to_sigma(to_sigma):
    table = percent_table(to_sigma)
    asked = [0.0005, 0.1, 0.25, 1 / 3, 0.5, 0.9, 0.995]
    found = percent_of(torch.tensor([to_sigma(percent) for percent in asked]), table)
    torch.testing.assert_close(found, torch.tensor(asked), rtol=0, atol=3e-6)
    assert percent_of_level(torch.tensor([to_sigma(0.25)] * 3), table) == 0.25  # so that start 0.25 holds there
    assert percent_of_level(torch.tensor(to_sigma(1e-7) * 40), table) == 0.0  # restarted with more noise than there is
    assert percent_of_level(torch.zeros(2), table) == 1.0


def test_percent_of_a_timestep():
    assert [percent_of_time(time) for time in (999, 749.25, torch.tensor([499.5, 3.0]), 0, 1200)] == [
        0.0, 0.25, 0.5, 1.0, 0.0,
    ]  # fmt: skip


@pytest.mark.parametrize("to_sigma", [diffusion, shifted])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 20, 50])
def test_steps_alike_in_time_walk_from_one_draw_to_the_next(steps, to_sigma):
    levels = uniform(steps, to_sigma)
    found = numbers(levels, levels[:-1], to_sigma)
    assert found[:-1] == list(range(steps - 1))
    assert found[-1] == pytest.approx(steps - 1, abs=2)  # its next level is 0, which is not quite in time


@pytest.mark.parametrize("to_levels", [karras, exponential])
@pytest.mark.parametrize("steps", [4, 9, 20, 50])
def test_steps_of_the_common_lists_do_too(to_levels, steps):
    levels = to_levels(steps)
    assert numbers(levels, levels[:-2]) == list(range(steps - 1))
    assert numbers(levels[2:], levels[2:-2]) == list(range(2, steps - 1))


@pytest.mark.parametrize("to_levels", [uniform, karras, exponential, jagged])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_a_part_of_a_run_has_the_draws_of_the_whole(to_levels, steps):
    """At the levels, and between them (dpm_2, the 2s and SDE samplers)."""
    levels = to_levels(steps)
    between = (levels[:-1] * levels[1:].clamp_min(LOW / 2)).sqrt()
    at_whole, between_whole = numbers(levels, levels[:-1]), numbers(levels, between)
    for first in range(steps):
        for last in range(first + 1, steps + 1):
            part = levels[first : last + 1]
            assert numbers(part, part[:-1]) == at_whole[first:last]
            assert numbers(part, between[first:last]) == between_whole[first:last]


@pytest.mark.parametrize("to_levels", [uniform, karras, exponential])
@pytest.mark.parametrize("steps", [4, 20])
def test_the_last_level_of_a_part_has_its_own_draw(to_levels, steps):
    """heun asks the model there too; the next part begins there."""
    levels = to_levels(steps)
    for last in range(1, steps - 1):
        assert numbers(levels[: last + 1], levels[last : last + 1]) == [last]


@pytest.mark.parametrize("to_levels", [uniform, karras, jagged])
def test_a_rising_list(to_levels):
    """Unsampling: from a picture to its noise."""
    levels = to_levels(9)[:-1].flip(0)
    whole = numbers(levels, levels[:-1])
    assert numbers(levels[3:], levels[3:-1]) == whole[3:] and numbers(levels[:5], levels[:4]) == whole[:4]
    if to_levels is uniform:
        assert whole == list(range(8, 0, -1))
    assert [int(place_of(levels, level)) for level in levels] == list(range(9))


def test_a_level_above_the_lists_is_the_next_ones():
    """Churn adds noise before a step."""
    levels = uniform(10)
    assert numbers(levels, levels[:-2] * 1.05) == list(range(9))
    assert numbers(levels, [levels[0] * 3]) == [0]


def test_recomputed_levels_are_the_lists():
    levels = karras(20)
    again = levels[:-1].log().neg().neg().exp()  # what samplers do that compute in log space
    assert numbers(levels, again) == numbers(levels, levels[:-1])
    assert [int(place_of(levels, level)) for level in again] == list(range(20))


def test_uneven_steps_mostly_have_other_draws():
    alike = torch.tensor([a == b for steps in range(6, 51) for a, b in _neighbours(_walk(jagged(steps)), 4)])
    assert 0.1 < alike.float().mean() < 0.4  # of independent draws out of four a quarter is


def test_no_number_is_asked_of_the_device():
    """Tensors without contents refuse that, as a GPU would wait."""
    draws = draws_of(uniform(8)).to(torch.device("meta"))
    assert draws.number(torch.empty((), device="meta")).shape == ()
    levels, table = torch.empty(9, device="meta"), torch.empty(1000, device="meta")
    assert Draws.of(levels, table).at.shape == (9,)


def _walk(levels):
    return numbers(levels, levels[:-1])


def _neighbours(found, length):
    found = [number % length for number in found]
    return zip(found[:-1], found[1:], strict=True)


def test_lists_of_equal_levels_and_of_one():
    assert numbers(torch.tensor([3.0, 3.0, 0.0]), torch.tensor([3.0])) != []
    assert int(place_of(torch.tensor([3.0]), torch.tensor(3.0))) == 0
