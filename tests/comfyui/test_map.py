"""ToMe Map: what it draws is what was merged, and recording changes nothing."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from . import dit_host
from .host import conditioning, least_unet, pack_module, run_node, sample

METHODS = ("sample", "merge", "merge_queries", "merge_keys", "downsample", "prune")


@pytest.fixture
def record(comfy_nodes):
    """record(model) -> (the clone that is recorded, its record), through the node itself."""
    return lambda model: comfy_nodes["ToMeRecord"].execute(model=model).result


@pytest.fixture
def draw(comfy_nodes):
    """draw(record, image, ...) -> the map [P, H, W, 3], through the node itself."""
    defaults = {"show": "groups", "level": -1, "layer": 0, "step": -1, "opacity": 0.6, "legend": False}
    return lambda record, image, **values: run_node(
        comfy_nodes["ToMeMap"], record=record, image=image, **{**defaults, **values}
    )


class Spy:
    """Every plan that ModelCall gives out, by (draw, grid, layer): what was really used, seen from outside."""

    def __init__(self, monkeypatch):
        self.plans, self.metrics = {}, {}
        call = pack_module("unet").ModelCall
        plan = call.plan

        def spied(this, metric, grid):
            layer = this._layers.get(grid, 0)
            made = plan(this, metric, grid)
            if made is not None:
                self.plans.setdefault((int(this.step), grid, layer), made)
                self.metrics.setdefault((int(this.step), grid, layer), metric)
            return made

        monkeypatch.setattr(call, "plan", spied)


@pytest.fixture
def spy(comfy_nodes, monkeypatch):
    return Spy(monkeypatch)


def grey(height, width, batch=1):
    return torch.full((batch, height, width, 3), 0.5)


def maps():
    """The core's module, under the name that ComfyUI loaded it by."""
    return sys.modules[pack_module("record_nodes").draw_maps.__module__]


def chosen(run, level, layer, step):
    return maps().choose(run, level, layer, step)


def by_hand(plan, row):
    """Each token's representative, worked out token by token."""
    index, groups = plan.index[row].tolist(), plan.groups[row].tolist()
    return [index[group] for group in groups]


@pytest.mark.parametrize("method", METHODS)
def test_owners_are_those_of_the_plans_that_were_used(sd15, tome, record, spy, method):
    model, kept = record(tome(sd15, method=method))
    sample(model, steps=2, batch=2)
    run, seen = kept.run(), 0
    step_of = {facts.draw: step for step, facts in run.facts.items()}
    for (draw, grid, layer), plan in spy.plans.items():
        step = step_of[draw]
        level = {32: 0, 16: 1, 8: 2}[grid[0]]
        found = chosen(run, level, layer, step)
        assert found.grid == grid
        # ComfyUI puts the prompted rows behind the others; both images' own rows must be found.
        first = 2 if method in ("merge", "merge_queries", "merge_keys", "prune") else 0
        for image in range(len(found.owner)):
            assert found.owner[image].tolist() == by_hand(plan, first + image)
        seen += 1
    assert seen == 2 * 10  # ten layers of the small model, in each step


def test_the_rows_that_are_kept_are_the_prompted_ones(sd15, tome, record, spy):
    seen = []
    model, kept = record(tome(sd15, method="merge"))
    model = model.clone()
    model.set_model_attn1_patch(lambda q, k, v, options: (seen.append(options["cond_or_uncond"]), (q, k, v))[1])
    sample(model, steps=1)
    (order,) = {tuple(found) for found in seen}
    plan = spy.plans[0, (32, 32), 2]  # behind attention to the prompt
    assert by_hand(plan, 0) != by_hand(plan, 1), "the two rows must differ for this to tell anything"
    assert chosen(kept.run(), 0, 2, 0).owner[0].tolist() == by_hand(plan, order.index(0))


@pytest.mark.parametrize("method", METHODS)
def test_a_map_paints_each_group_in_one_colour_and_neighbours_in_two(sd15, tome, record, draw, spy, method):
    model, kept = record(tome(sd15, method=method))
    sample(model, steps=1)
    drawn = draw(kept, grey(256, 256), layer=1, step=0)[0]  # 8 pixels a token
    plan = spy.plans[0, (32, 32), 1]
    row = 1 if plan.groups.stride(0) else 0
    owner = torch.tensor(by_hand(plan, row)).reshape(32, 32)
    corner = drawn[1::8, 1::8]  # away from borders, which lie right and below, and from the mark in the middle
    count = torch.bincount(owner.flatten(), minlength=1024)
    for name in owner.unique().tolist():
        mine = corner[owner == name]
        assert (mine == mine[0]).all(), "one group, one colour"
        assert ((mine[0] - 0.5).abs().max() < 1e-6) == (count[name] == 1), "a token on its own stays as it was"
    middle = drawn[4::8, 4::8].amin(-1)
    stands = (owner.flatten() == torch.arange(1024)) & (count[owner.flatten()] > 1)
    assert (middle.flatten() == 1.0).tolist() == stands.tolist(), "a white mark on each token that stands for others"
    differ = (owner[:, 1:] != owner[:, :-1]) & ((count[owner] > 1)[:, 1:] | (count[owner] > 1)[:, :-1])
    border = drawn[1::8, 7:-1:8].amax(-1) < corner[:, :-1].amax(-1) - 0.05
    assert border.tolist() == differ.tolist(), "a dark line between two groups and nowhere else"


def test_kept_tokens_stay_bright_and_the_others_go_dark(sd15, tome, record, draw, spy):
    model, kept = record(tome(sd15, method="merge"))
    sample(model, steps=1)
    drawn = draw(kept, grey(256, 256), show="kept tokens")[0]
    plan = spy.plans[0, (32, 32), 0]
    stays = torch.zeros(1024, dtype=torch.bool)
    stays[plan.index[1]] = True
    assert ((drawn[4::8, 4::8, 0] - 0.5).abs() < 1e-6).flatten().tolist() == stays.tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ["tome first", "record first"])
def test_recording_does_not_change_the_picture(sd15, tome, record, method, order):
    plain = sample(tome(sd15, method=method))
    model = record(tome(sd15, method=method))[0] if order == "tome first" else tome(record(sd15)[0], method=method)
    assert torch.equal(sample(model), plain)


def test_unrecorded_runs_keep_nothing(sd15, tome, record, monkeypatch):
    begun = []
    module = pack_module("record")
    real = module.Record.run_now
    monkeypatch.setattr(module.Record, "run_now", lambda *args: begun.append(1) or real(*args))
    model = tome(sd15, method="merge")
    sample(model)
    assert not begun
    recorded, kept = record(model)
    sample(model)  # the model before the node is not recorded
    assert not begun and kept.run() is None
    sample(recorded)
    assert begun and kept.run() is not None


def test_an_empty_record_says_so_in_the_picture(sd15, tome, record, draw):
    _, kept = record(tome(sd15))
    image = grey(512, 512)
    drawn = draw(kept, image)
    assert not torch.equal(drawn, image)
    assert torch.equal(drawn[:, :300], image[:, :300]), "the picture itself is still to be seen"


def says(run, level=-1, layer=0, step=-1):
    """Why there is no map."""
    with pytest.raises(maps().NoMap) as caught:
        chosen(run, level, layer, step)
    return " ".join(caught.value.args)


def test_what_is_not_there_is_said_with_its_range(sd15, tome, record):
    model, kept = record(tome(sd15, min_tokens=256, start=0.5))
    sample(model, steps=4)
    run = kept.run()
    assert "Step 9 was not run: there are 0 to 3" in says(run, step=9)
    assert "Nothing was merged in step 1, but in 2, 3" in says(run, step=1)
    assert "Level 0 has no merged layer 7: there are 0 to 2" in says(run, level=0, layer=7)
    assert "Nothing was merged at level 2, but at 0, 1. Fewer than min tokens 256." in says(run, level=2)
    model, kept = record(tome(sd15))
    sample(model, steps=1)
    assert says(kept.run(), step=3) == "Step 3 was not run: there is 0 alone."


def test_levels_layers_and_steps_of_the_defaults(sdxl, tome, record):
    model, kept = record(tome(sdxl, end=0.5))
    sample(model, steps=4)
    found = chosen(kept.run(), -1, 0, -1)
    assert (found.level, found.step, found.grid) == (1, 1, (16, 16))  # SDXL has no attention at level 0
    assert found.caption()[1].startswith("level 1 (16x16), layer 0 (input block 3), step 1 of 0 to 3")


def test_a_block_of_several_layers_tells_which(sdxl, tome, record):
    model, kept = record(tome(sdxl))
    sample(model, steps=1)
    assert "(input block 5, transformer 1)" in chosen(kept.run(), 2, 1, 0).caption()[1]


def test_the_legend_counts_tokens(sd15, tome, record):
    model, kept = record(tome(sd15, method="merge", ratio=0.9))  # capped at 0.75
    sample(model, steps=1)
    assert chosen(kept.run(), 0, 0, 0).caption()[0] == "merge 0.9: 1024 to 256 tokens (-75%)"


@pytest.mark.parametrize("method", ["sample", "merge", "downsample"])
def test_odd_sizes(sd15, tome, record, draw, spy, method):
    model, kept = record(tome(sd15, method=method))
    sample(model, height=200, width=264, steps=1)  # latents of 25 x 33, then 13 x 17, 7 x 9
    for level, grid in enumerate([(25, 33), (13, 17), (7, 9)]):
        found = chosen(kept.run(), level, 0, 0)
        assert found.grid == grid
        plan = spy.plans[0, grid, 0]
        row = 1 if plan.groups.stride(0) else 0
        assert found.owner[0].tolist() == by_hand(plan, row)
        assert draw(kept, grey(200, 264), level=level).shape == (1, 200, 264, 3)
        # A level's token is 8 * 2 ** level pixels wide; the last ones reach over the edge.
        cell = 8 * 2**level
        stays = torch.tensor(by_hand(plan, row)) == torch.arange(math.prod(grid))
        bright = draw(kept, grey(200, 264), level=level, show="kept tokens")[0, ..., 0] > 0.49
        assert bright[::cell, ::cell].flatten().tolist() == stays.tolist()
        lower_right = bright[cell - 1 :: cell, cell - 1 :: cell]
        assert torch.equal(lower_right, stays.reshape(grid)[: lower_right.shape[0], : lower_right.shape[1]])


def test_a_picture_of_another_size_gets_the_same_tokens(sd15, tome, record, draw):
    model, kept = record(tome(sd15))
    sample(model, steps=1)
    small, large = (draw(kept, grey(side, side), show="kept tokens")[0] for side in (256, 1024))
    assert torch.equal(large[16::32, 16::32], small[4::8, 4::8])


def test_each_image_of_a_batch_has_its_own(sd15, tome, record, draw):
    model, kept = record(tome(sd15, method="merge"))
    sample(model, steps=1, batch=3)
    images = grey(256, 256, 3)
    every = draw(kept, images, picture=-1)
    assert every.shape == images.shape
    assert not torch.equal(every[0], every[1])
    for number in range(3):
        assert torch.equal(draw(kept, images, picture=number)[0], every[number])
    with pytest.raises(ValueError, match=r"picture must be -1 \(all\) or in 0 to 2, got 3"):
        draw(kept, images, picture=3)
    for picture in (-1, 0):
        with pytest.raises(ValueError, match="ToMe Map needs at least one picture, got none"):
            draw(kept, images[:0], picture=picture)


def test_a_second_pass_is_a_sampling_of_its_own(sd15, tome, record):
    model, kept = record(tome(sd15))
    first = sample(model, steps=2)
    sample(model, height=512, width=512, steps=3, latent=torch.nn.functional.interpolate(first, scale_factor=2))
    assert kept.run(0).tally.of_steps == 3 and chosen(kept.run(0), 0, 0, 0).grid == (64, 64)
    assert kept.run(1).tally.of_steps == 2 and chosen(kept.run(1), 0, 0, 0).grid == (32, 32)
    assert kept.run(2) is None
    for _ in range(4):
        sample(model, steps=1)
    assert kept.run(3) is not None and kept.run(4) is None, "old samplings are let go of"


def test_two_records_on_one_model_are_refused(sd15, record):
    with pytest.raises(ValueError, match="has a ToMe Record node already"):
        record(record(sd15)[0])


@pytest.mark.parametrize("turn", [1, -1])
def test_an_area_of_the_picture_does_not_hide_the_whole(sd15, tome, record, turn):
    """A prompt for a quarter is sampled on a grid of its own, in the same step."""
    model, kept = record(tome(sd15))
    areas = [*conditioning(1), *conditioning(3, area=(16, 16, 0, 0), strength=1.0, set_area_to_bounds=False)]
    sample(model, steps=1, positive=areas[::turn])
    found = chosen(kept.run(), -1, 0, 0)
    assert found.grid == found.facts.latent == (32, 32)


def test_memory_has_a_limit_and_it_is_said(sd15, tome, record, monkeypatch):
    monkeypatch.setattr(pack_module("record"), "_MOST_BYTES", 40_000)
    model, kept = record(tome(sd15, method="merge"))
    sample(model, steps=4)
    assert chosen(kept.run(), 0, 0, 0).owner.dtype == torch.int32
    assert "was not kept: the run was too long and large" in says(kept.run(), step=3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_transformers(comfy_nodes, tome, record, draw, spy, name, method):
    model, kept = record(tome(dit_host.small(name), method=method))
    dit_host.call(model, name)
    run = kept.run()
    facts = dit_host.SMALL[name]
    found = chosen(run, 0, 1, 1)
    assert len(found.owner[0]) == facts.image
    plan = spy.plans[found.facts.draw, found.grid, 1]
    assert found.owner[0].tolist() == by_hand(plan, 0)
    if name == "wan":
        assert len(found.grid) == 3
        video = grey(64, 96, 9)
        frames = draw(kept, video, picture=-1, show="kept tokens", layer=1)
        stays = (found.owner[0] == torch.arange(facts.image)).reshape(found.grid)
        for number, frame in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2)):
            assert (frames[number, 8::16, 8::16, 0] > 0.49).tolist() == stays[frame].tolist()
    else:
        assert "double block 0" in chosen(run, 0, 0, 1).caption()[1]
        assert "single block 0" in chosen(run, 0, 1, 1).caption()[1]


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_what_a_query_saw_under_multires(comfy_nodes, tome, record, draw, name):
    """Recording changes nothing; the node draws the query, the head and the layer that were asked for."""
    model = tome(dit_host.small(name), method="multires", ratio=0.75, min_tokens=0, levels="0")
    plain = dit_host.sample(model, name, steps=2)
    told, kept = record(model)
    assert torch.equal(dit_host.sample(told, name, steps=2), plain)
    run, tokens = kept.run(), dit_host.SMALL[name].image
    grid = run.facts[1].full
    kept_of = run.owner(1, grid, 0)
    assert kept_of.shape[:2] == (1, 2) and kept_of.dtype == torch.uint8  # one prompted row, two heads
    size = [16 * side for side in grid[-2:]]
    image = grey(*size, batch=9 if len(grid) == 3 else 1)
    first = draw(kept, image)
    assert first.shape == (1, *size, 3) and len(first.unique()) > 3
    asked = [{"x": 3, "y": 5}]
    # Of four tiles two heads or layers may choose the same.
    asked += [{"head": 0}, {"layer": 1}, {"step": 0}] if name == "flux" else []
    assert all(not torch.equal(first, draw(kept, image, **other)) for other in asked)
    assert not run.is_full and tokens == math.prod(grid)
    with pytest.raises(ValueError, match="x must be -1"):
        draw(kept, image, x=size[1])


def test_other_methods_take_no_notice_of_a_query(sd15, tome, record, draw):
    model, kept = record(tome(sd15, method="sample"))
    sample(model, steps=1)
    image = grey(64, 64)
    assert torch.equal(draw(kept, image), draw(kept, image, x=999, y=999, head=50))


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_under_torch_compile(comfy_nodes, tome, record, draw, method):
    torch._dynamo.reset()
    eager, seen = record(tome(least_unet(), method=method))
    plain = sample(eager, steps=1)
    merged = tome(least_unet(), method=method)
    model, kept = record(run_node(comfy_nodes["TorchCompileModel"], model=merged, backend="eager"))
    made = sample(model, steps=1)
    torch._dynamo.reset()
    assert (made - plain).norm() / plain.norm() < 1e-4
    if method == "sample":  # worked out anew, so nothing needs to be seen
        assert torch.equal(chosen(kept.run(), 0, 1, 0).owner, chosen(seen.run(), 0, 1, 0).owner)
    else:
        assert "Under torch.compile it cannot be seen what merge chose" in says(kept.run())
    assert draw(kept, grey(256, 256)).shape == (1, 256, 256, 3)


def test_a_host_with_a_seed_for_each_image(comfy_nodes):
    """AUTOMATIC1111 has: each picture of a batch is merged as if it were alone."""
    made, config = pack_module("record"), pack_module("unet").ToMeConfig(min_tokens=0)
    call = pack_module("unet").ModelCall(config, (16, 16), torch.device("cpu"), seed=torch.tensor([5, 6]), step=2)
    run = made.Run(config, None)
    run.images = 2
    run.note(2, made.StepFacts(config, (16, 16), (16, 16), seeds=(5, 6)))
    run.tally.call(2, config.ratio)
    told = made.CallRecord(run, 2, slice(0, 2), (16, 16))
    plans = [call.plan(torch.zeros(2, 256, 1), (16, 16)) for _ in range(2)]
    for plan in plans:
        told.layer("input block 1", (16, 16), plan)
    found = chosen(run, 0, 1, 2)
    assert [found.owner[row].tolist() for row in range(2)] == [by_hand(plans[1], row) for row in range(2)]
    assert found.owner[0].tolist() != found.owner[1].tolist()


def test_a_seed_of_64_bits(sd15, tome, record, spy):
    model, kept = record(tome(sd15, seed=2**64 - 3))
    sample(model, steps=1)
    assert chosen(kept.run(), 0, 0, 0).owner[0].tolist() == by_hand(spy.plans[0, (32, 32), 0], 0)
