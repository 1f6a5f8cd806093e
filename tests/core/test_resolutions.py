"""What a query saw at three resolutions: kept in two bits, drawn over a picture, timed for a report."""

from __future__ import annotations

import math

import pytest
import torch

from shared_tome import ModelCall, kernels
from shared_tome.attention.sequence import JointCall
from shared_tome.core import multires
from shared_tome.core.resolutions import packed, resolution_of_tokens
from shared_tome.inspect import record
from shared_tome.inspect.maps import draw_maps
from shared_tome.inspect.record import CallRecord, ChoosingTimer, Run, StepFacts
from shared_tome.inspect.report import StepTime, Tally

from .helpers import config

CPU = torch.device("cpu")
HEADS, D = 3, 8


def heads(length, rows=2):
    generator = torch.Generator().manual_seed(0)
    return [1.5 * torch.randn(rows, HEADS, length, D, generator=generator) for _ in range(3)]


def recorded(grid, before=3, behind=2, rows=2, **options):
    """A run of one call with two layers, as a host has it; q and k."""
    ours = config(method="multires", ratio=0.75, **options)
    run = Run(ours)
    run.images = rows
    run.note(0, StepFacts(ours, grid[-2:], grid))
    run.tally.call(0, 0.75)
    q, k, v = heads(before + math.prod(grid) + behind, rows)
    call, told = ModelCall(ours, grid, CPU), CallRecord(run, 0, slice(0, rows), grid)
    joint = JointCall(True, ("torch",), lambda *_: None)
    for number in range(2):
        plan = call.plan(torch.zeros(rows, math.prod(grid), 1), grid)
        assert told.layer(f"block {number}", grid, plan) == number
        joint.attend(q + number, k, v, before, plan)
    told.end()
    return run, q, k


def by_hand(grid, before, length, q, k, row, head, token):
    """[N]: the resolution of each token for a query token, from the specification's lists."""
    tiles = multires.cut_tiles(grid, CPU, before, length, *multires.tile_sizes(math.prod(grid)))
    counts = multires.tile_counts(tiles, *multires.shares(0.75))
    lists = multires.choose(multires.scores(q, k, tiles, D**-0.5), tiles, counts)
    order = (tiles.rows - before).tolist()
    ask = order.index(token) // tiles.queries
    whole, half = counts[:2] if ask < tiles.image_query_tiles else counts[2:]
    expected = torch.zeros(math.prod(grid), dtype=torch.uint8)
    for at, tile in enumerate(lists[row, head, ask].tolist()):
        if tile < tiles.image:
            places = order[tile * tiles.size : (tile + 1) * tiles.size]
            expected[places] = int(at >= whole) + int(at >= whole + half)
    return expected


@pytest.mark.parametrize("grid", [(12, 16), (13, 11), (2, 7, 9), (66, 65)])
def test_what_is_kept_is_what_was_chosen(grid):
    run, q, k = recorded(grid)
    tokens, seen = math.prod(grid), set()
    for row, head, token in ((0, 0, 0), (1, 2, tokens // 2), (1, 1, tokens - 1)):
        kept = run.owner(0, grid, 1)[row]
        found = resolution_of_tokens(kept, grid, token)
        assert found.shape == (HEADS, tokens)
        expected = by_hand(grid, 3, 3 + tokens + 2, q + 1, k, row, head, token)
        assert torch.equal(found[head], expected)
        assert found[head, token] == 0, "its own tile is whole"
        seen |= set(found.flatten().tolist())
    assert seen == {0, 1, 2}


def test_two_bits_a_pair():
    tiles = multires.cut_tiles((66, 65), CPU, 0, None, 64, 128)
    counts = multires.tile_counts(tiles, 0.1, 0.4)
    q, k, _ = heads(66 * 65, 1)
    kept = packed(multires.choose(multires.scores(q, k, tiles, 0.3), tiles, counts), tiles, counts)
    assert kept.shape == (1, HEADS, math.ceil(67 * 64 / 128), 17) and kept.dtype == torch.uint8


def test_a_run_that_is_full_or_of_sample_keeps_none():
    run, *_ = recorded((12, 16))
    assert run.owner(0, (12, 16), 0) is not None and run.owner(1, (12, 16), 0) is None
    small = Run(run.config, most_bytes=10)
    small.keep(0, (12, 16), 0, run.owner(0, (12, 16), 0))
    assert small.is_full and small.owner(0, (12, 16), 0) is None


def draw(run, image=None, pictures=(0,), legend=False, **more):
    image = torch.full((1, 96, 128, 3), 0.5) if image is None else image
    given = {"level": -1, "layer": 1, "step": -1, "show": "groups", "opacity": 0.6, **more}
    return draw_maps(run, image, pictures, legend=legend, **given)


@pytest.mark.parametrize("head", [0, 2, -1])
def test_a_map_is_darker_where_the_query_saw_less(head):
    """Tokens of 8 pixels. Brightness falls from whole to half to quarter; of the mean of heads by their mean."""
    run, q, k = recorded((12, 16))
    image = torch.rand(2, 96, 128, 3, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.7
    made = draw(run, image, (1,), x=100, y=43, head=head)[0]
    token = 43 // 8 * 16 + 100 // 8
    each = torch.stack([by_hand((12, 16), 3, 197, q + 1, k, 1, one, token) for one in range(HEADS)]).float()
    dark = (each.mean(0) if head == -1 else each[head]).view(12, 16) / 2
    deep = image[1].mean(-1, keepdim=True) * 0.4 * 0.6 + 0.05 * 0.6
    amount = 0.84 * dark.repeat_interleave(8, 0).repeat_interleave(8, 1)[..., None]
    expected = image[1] + amount * (deep - image[1])
    ours = torch.zeros(12, 16, dtype=torch.bool)
    ours.view(-1)[token] = True
    elsewhere = ~ours.repeat_interleave(8, 0).repeat_interleave(8, 1)
    torch.testing.assert_close(made[elsewhere], expected[elsewhere])
    assert (made[40, 96] - torch.tensor([0.42, 0.78, 0.55])).abs().max() < 1e-6, "the query is green"
    assert (made[43, 99] == 1.0).all(), "with a dot"


def test_the_middle_by_default_and_pixels_that_are_not_there():
    run, *_ = recorded((12, 16))
    assert torch.equal(draw(run), draw(run, x=64, y=48)) and not torch.equal(draw(run), draw(run, x=0, y=0))
    for name, value, most in (("x", 128, 127), ("x", -2, 127), ("y", 96, 95)):
        with pytest.raises(ValueError, match=f"{name} must be -1 .* 0 to {most}, got {value}"):
            draw(run, **{name: value})


def test_the_legend_says_what_was_seen(monkeypatch):
    said = []
    monkeypatch.setattr(
        "shared_tome.inspect.drawing.draw_legend", lambda image, lines, keys=(): said.append((lines, keys)) or image
    )
    run, q, k = recorded((12, 16))
    draw(run, legend=True, x=0, y=0, head=1)
    found = by_hand((12, 16), 3, 197, q + 1, k, 0, 1, 0)
    (first, second), keys = said[0]
    assert first.startswith("multires 0.75, head 1 of 0 to 2: the query sees")
    for resolution, words in enumerate(("of the tokens whole", "at half", "at quarter resolution")):
        assert f"{(found == resolution).float().mean():.0%} {words}" in first
    assert "level 0 (12x16), layer 1 (block 1), step 0" in second
    assert [words for _, words in keys] == ["the query", "whole", "half resolution", "quarter"]
    draw(run, legend=True)
    assert "mean of 3 heads" in said[1][0][0]
    monkeypatch.setattr("shared_tome.inspect.maps.draw_legend", lambda image, lines: said.append(lines) or image)
    draw(run, head=3)
    assert said[2] == ("There is no head 3: there are 0 to 2.",)


def test_where_sample_took_its_place_its_map_is_drawn(monkeypatch):
    """Nothing was kept: no attention was computed at three resolutions. Of a compiled run nothing is known."""
    run, *_ = recorded((12, 16))
    run._owners.clear()
    sampled = Run(config(method="sample", ratio=0.75))
    sampled.note(0, StepFacts(sampled.config, (12, 16), (12, 16)))
    sampled.tally.call(0, 0.75)
    told, call = CallRecord(sampled, 0, slice(0, 2), (12, 16)), ModelCall(sampled.config, (12, 16), CPU)
    for number in range(2):
        told.layer(f"block {number}", (12, 16), call.plan(torch.zeros(2, 192, 1), (12, 16)))
    assert torch.equal(draw(run), draw(sampled))
    said = []
    monkeypatch.setattr("shared_tome.inspect.maps.draw_legend", lambda image, lines: said.append(lines) or image)
    run.compiled = True
    draw(run, layer=0)
    assert said == [("Under torch.compile it cannot be seen", "what multires chose.")]


def test_choosing_is_timed_once_a_shape_and_told_by_the_report(monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True

    times, asked = iter([(2.0, 0.0), (100.0, 0.0), (5.0, 0.0), (50.0, 0.0)]), []
    monkeypatch.setattr(record, "times_of", lambda call, device: asked.append(call().shape) or next(times))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    timer, joint = ChoosingTimer(), JointCall(True, ("torch",), lambda *_: None)
    ours = config(method="multires", ratio=0.75)
    for grid, layers in (((12, 16), 3), ((8, 8), 1)):
        call, given = ModelCall(ours, grid, CPU), heads(math.prod(grid))
        q, k, v = (x.as_subclass(OnGPU) for x in given)
        for number in range(layers):
            plan = call.plan(torch.zeros(2, math.prod(grid), 1), grid)
            timer.watch(plan)
            got = joint.attend(q, k, v, 0, plan)
            assert torch.equal(got.as_subclass(torch.Tensor), kernels_outcome(given, grid, number))
    assert len(asked) == 4 and timer.share == pytest.approx((3 * 2 + 5) / (3 * 100 + 50))
    time = StepTime(30.0, 20.0, 5, 1, 3, 0.75, "made-up GPU", timer.share)
    text = Tally(ours).report(time).text()
    assert "Choosing the tiles: 3.1% of the time of these attentions" in text
    assert "Choosing the tiles: not measured" in Tally(ours).report().text()
    assert Tally(ours).report(time).to_dict()["time"]["choosing"] == timer.share
    assert "Choosing" not in Tally(config()).report(time).text()


def kernels_outcome(given, grid, layer):
    tiles = multires.cut_tiles(grid, CPU, 0, None, 16, 16)
    drawn = multires.draw_keys(tiles, torch.tensor(0), 0)
    counts = multires.tile_counts(tiles, *multires.shares(0.75))
    return kernels.attend_multires(*given, tiles, drawn, counts, layer, D**-0.5).transpose(1, 2)


def test_without_a_gpu_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(record, "times_of", lambda *_: 1 / 0)
    timer, plan = ChoosingTimer(), ModelCall(config(method="multires"), (8, 8), CPU).plan(torch.zeros(2, 64, 1), (8, 8))
    timer.watch(plan)
    assert JointCall(True, ("torch",), lambda *_: None).attend(*heads(64), 0, plan) is not None
    assert timer.share is None
