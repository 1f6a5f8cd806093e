"""Maps in the gallery: what they show is what was merged, where they stand, and what they leave as it was."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from .test_forge import _Loaded

ON = {"ratio": 0.5, "min_tokens": 0, "map": True}


@pytest.fixture
def drawn(tome, monkeypatch):
    """What each map was drawn from: (layer that was chosen, row of the batch)."""
    found, choose, place = [], tome.maps.choose, tome.maps._place

    def chosen(*args):
        found.append([choose(*args), None])
        return found[-1][0]

    def placed(number, pictures, which):
        found[-1][1] = place(number, pictures, which)[0]
        return place(number, pictures, which)

    monkeypatch.setattr(tome.maps, "choose", chosen)
    monkeypatch.setattr(tome.maps, "_place", placed)
    return found


@pytest.fixture
def plans(tome, monkeypatch):
    """Every plan that was used: (step, grid) -> of its first layer, the owner of each token, a row for each row."""
    found, plan = {}, tome.core.ModelCall.plan

    def spied(self, metric, grid):
        first = grid not in self._layers
        made = plan(self, metric, grid)
        if first and made is not None:
            owner = made.index.gather(1, made.groups).expand(metric.shape[0], -1)
            found.setdefault((self.step, grid), []).append(owner)
        return made

    monkeypatch.setattr(tome.core.ModelCall, "plan", spied)
    return found


def test_a_map_follows_each_picture_with_its_text(host):
    plain, _ = host.generate([{**ON, "map": False}], seeds=(1, 2), batch_size=2)
    images, p = host.generate([ON], seeds=(1, 2), batch_size=2)
    shown = p.processed
    assert all((a == b).all() for a, b in zip(plain, images, strict=True)), "the map changes the picture"
    assert len(shown.images) == 5 and len(shown.infotexts) == 5  # a grid, two pictures, two maps
    assert shown.infotexts[3:] == shown.infotexts[1:3] and shown.infotexts[1] != shown.infotexts[2]
    for picture, made in zip(shown.images[1:3], shown.images[3:], strict=True):
        assert isinstance(made, Image.Image) and made.size == picture.size and made.mode == "RGB"
        assert made.tobytes() != picture.tobytes()
    assert "map" not in shown.infotexts[1]


def test_without_it_there_is_no_map_and_nothing_is_kept(host, tome):
    _, p = host.generate([{**ON, "map": False}])
    assert len(p.processed.images) == 1 == len(p.processed.infotexts)
    assert not any(run._owners for run in p.tome_state.runs.values())


@pytest.mark.parametrize("method", ["sample", "merge", "merge_queries", "merge_keys", "downsample", "prune"])
def test_a_map_shows_what_was_merged(host, drawn, plans, method):
    host.generate([{**ON, "method": method}], seeds=(5, 6), batch_size=2)
    for image, (chosen, row) in enumerate(drawn):
        assert (chosen.level, chosen.layer, chosen.step, chosen.grid) == (0, 0, 2, (16, 16))
        used = plans[2, (16, 16)][0][image]
        assert row in (image, 0) and torch.equal(chosen.owner[row].long(), used.long())


@pytest.mark.parametrize("prompts", [["a", "b"], ["a AND b", "c"], ["a", "b AND c"], ["long:a", "b"]])
@pytest.mark.parametrize("together", [True, False], ids=["one call", "split calls"])
def test_each_image_has_the_choice_of_its_first_prompt(host, drawn, plans, prompts, together):
    """However the host splits the rows into calls. Level 1 comes after a layer in which the prompts differ."""
    host.opts.data["batch_cond_uncond"] = together
    two = {"seeds": (5, 6), "batch_size": 2, "width": 256, "height": 256}
    host.generate([{**ON, "method": "merge", "levels": "1"}], prompts=prompts, **two)
    rows = torch.cat(plans[2, (16, 16)]).long()
    first = (0, len(prompts[0].split(" AND ")))
    for image, (chosen, row) in enumerate(drawn):
        assert row == image and torch.equal(chosen.owner[row].long(), rows[first[image]])
        assert not torch.equal(rows[first[image]], rows[image - 2]), "the negative prompt's are the same: no test"


def test_batches_after_each_other_have_maps_of_their_own(host, drawn):
    _, p = host.generate([ON], seeds=(1, 2, 3, 4), batch_size=2)
    assert len(p.processed.images) == 1 + 4 + 4 == len(p.processed.infotexts)
    assert p.processed.infotexts[5:] == p.processed.infotexts[1:5]
    owners = [chosen.owner[row] for chosen, row in drawn]
    assert [row for _, row in drawn] == [0, 1, 0, 1] and not torch.equal(owners[0], owners[2])


def test_the_hires_passs_map(host, drawn):
    host.generate([{**ON, "hires_ratio": 0.25}], enable_hr=True)
    ((chosen, _),) = drawn
    assert chosen.grid == (24, 24) and chosen.facts.config.ratio == 0.25


def test_the_first_passs_map_where_the_hires_pass_is_off(host, drawn):
    _, p = host.generate([{**ON, "hires_ratio": 0.0}], enable_hr=True)
    ((chosen, _),) = drawn
    assert chosen.grid == (16, 16) and p.processed.images[1].size == (192, 192)


def test_a_batch_without_a_hires_pass_has_not_the_one_of_the_batch_before(host, drawn, monkeypatch):
    """It was interrupted."""
    script = type(host.tabs["txt2img"].scripts[0])

    def interrupt(self, p, *args):
        host.interrupt_at = 2 if p.iteration else None

    monkeypatch.setattr(script, "process_batch", interrupt)
    _, p = host.generate([ON], seeds=(1, 2), batch_size=1, enable_hr=True)
    host.interrupt_at = None
    assert [chosen.grid for chosen, _ in drawn] == [(24, 24), (16, 16)]
    assert set(p.tome_state.runs) == {False}


def test_img2img(host, drawn):
    _, p = host.generate([ON], tab="img2img")
    assert len(p.processed.images) == 2 and len(drawn) == 1


def test_masks_among_the_pictures_keep_texts_in_step(host):
    _, p = host.generate([ON], seeds=(1, 2), batch_size=1, return_mask=True)
    shown = p.processed
    assert len(shown.images) == len(shown.infotexts) == 1 + 4 + 2
    assert shown.infotexts[-2:] == shown.infotexts[1:3]


@pytest.mark.parametrize("size", [(328, 264), (512, 512)])
def test_sizes(host, size):
    width, height = size
    _, p = host.generate([ON], width=width, height=height, steps=1)
    assert p.processed.images[1].size == size


def test_off_gives_no_map(host):
    for args in ([{**ON, "enabled": False}], [{**ON, "ratio": 0.0}]):
        _, p = host.generate(args)
        assert len(p.processed.images) == 1
    _, p = host.generate([ON], token_merging_ratio=0.4)
    assert len(p.processed.images) == 1


def test_a_map_of_nothing_says_why(host, tome, monkeypatch):
    lines = []
    monkeypatch.setattr(tome.maps.logger, "info", lambda text, *args: lines.append(text % args))
    _, p = host.generate([{**ON, "min_tokens": 4096}], width=512, height=512, steps=1, seeds=(1,))
    assert len(p.processed.images) == 2 and not any("nothing to draw" in line for line in lines)
    _, p = host.generate([{**ON, "min_tokens": 8192}], width=512, height=512, steps=1)
    assert any("nothing to draw" in line and "min tokens 8192" in line for line in lines)
    picture, made = p.processed.images
    assert picture.tobytes() != made.tobytes()
    top = (0, 0, 512, 256)
    assert picture.crop(top).tobytes() == made.crop(top).tobytes(), "more than the words was drawn"


def test_an_interrupt_before_the_first_step_breaks_nothing(host):
    host.interrupt_at = 0
    _, p = host.generate([ON])
    assert len(p.processed.images) == len(p.processed.infotexts) == 2


@pytest.mark.parametrize("tells", [False, True], ids=["forge", "reforge"])
@pytest.mark.parametrize("method", ["sample", "merge"])
def test_forge(host, drawn, plans, method, tells):
    host.shared.sd_model, host.forge = _Loaded(tells), True
    _, p = host.generate([{**ON, "method": method}], seeds=(5, 6), batch_size=2)
    assert len(p.processed.images) == 5
    for image, (chosen, row) in enumerate(drawn):
        assert row == image and torch.equal(chosen.owner[row].long(), plans[2, (16, 16)][0][image].long())


def test_forge_hires(host, drawn):
    host.shared.sd_model, host.forge = _Loaded(), True
    host.generate([{**ON, "method": "merge"}], enable_hr=True)
    ((chosen, _),) = drawn
    assert chosen.grid == (24, 24)
