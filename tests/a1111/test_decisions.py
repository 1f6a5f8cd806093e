"""What autotune decided stands in the picture's text: pasted on another GPU the same layers are merged."""

from __future__ import annotations

import sys

import pytest
import torch
from support.made_up_gpu import MadeUpTimes

from .host import FIRST
from .test_nothing import any_host  # noqa: F401
from .test_options import _parse

ON = {"ratio": 0.5, "min_tokens": 0}
LABEL = "ToMe decisions"


def part(name):
    """A module of the core as the host has loaded it."""
    return sys.modules[next(key for key in sys.modules if key.endswith(f"sd_webui_tome.shared_tome.autotune.{name}"))]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """On it level 0 of both passes does not pay."""
    gpu = MadeUpTimes(monkeypatch, tmp_path, *map(part, ("store", "layer", "decisions")))
    gpu.another(x16x16=False, x24x24=False)
    return gpu


@pytest.fixture
def lines(tome, monkeypatch):
    """What the log gets."""
    found = []
    monkeypatch.setattr(tome.notes.logger, "info", lambda text, *args: found.append(text % args if args else text))
    return found


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("hires", [False, True], ids=["one pass", "hires"])
def test_a_text_makes_the_same_picture_on_another_gpu(any_host, tome, gpu, hires):  # noqa: F811
    layers = {name: (32, 4) if any_host.forge else (channels, 2) for name, channels in (("0", 32), ("1", 64))}
    first, second = ("/".join(map(str, layers[level])) for level in "01")
    made, p = any_host.generate([ON], enable_hr=hires)
    assert gpu.keys and not p.troubles
    read = _parse(p.processed.infotexts[0])
    assert read[LABEL] == (
        f"+24x24 -24x24/{first} +16x16 -16x16/{first} +12x12/{second} +8x8/{second}"
        if hires
        else f"+16x16 -16x16/{first} +8x8/{second}"
    )
    gpu.another(x8x8=False, x12x12=False)
    other, _ = any_host.generate([ON], enable_hr=hires)
    assert not same(made, other)
    gpu.another(x8x8=False, x12x12=False)
    again, p = any_host.generate([tome.infotext.read(read)], enable_hr=hires)
    assert same(made, again) and not gpu.keys
    assert _parse(p.processed.infotexts[0])[LABEL] == read[LABEL]


def test_the_decisions_of_a_moving_ratio_are_told_for_each(host, tome, gpu, monkeypatch):
    layer = part("layer")
    monkeypatch.setattr(
        layer, "measure", lambda case, *_: layer.Decision(80.0, 40.0 if case.config.ratio > 0.4 else 79.0, 0.0)
    )
    options = {**ON, "ratio_end": 0.25}
    made, p = host.generate([options], steps=4)
    text = p.extra_generation_params[LABEL]
    assert text == (
        "+16x16@0.3 +16x16@0.35 +16x16@0.45 +16x16@0.5 "
        "-16x16/32/2@0.3 -16x16/32/2@0.35 +16x16/32/2@0.45 +16x16/32/2@0.5 "
        "-8x8/64/2@0.3 -8x8/64/2@0.35 +8x8/64/2@0.45 +8x8/64/2@0.5"
    )
    monkeypatch.setattr(layer, "measure", lambda case, *_: layer.Decision(80.0, 40.0, 0.0))
    gpu.another()
    assert not same(made, host.generate([options], steps=4)[0])
    gpu.another()
    assert same(made, host.generate([tome.infotext.read(_parse(p.processed.infotexts[0]))], steps=4)[0])
    assert not gpu.keys


def test_an_older_text_without_decisions_asks_autotune(host, tome, gpu):
    made, _ = host.generate([tome.infotext.read({"ToMe ratio": "0.5", "ToMe min tokens": "0"})])
    assert gpu.keys and same(made, host.generate([ON])[0])


def test_the_line_says_that_decisions_are_set(host, gpu, lines):
    _, p = host.generate([{**ON, "decisions": "+16x16 -16x16/32/2 +8x8/64/2"}])
    line = lines[-1]
    assert "level 1 (8x8): 64 to 32 tokens in 4 layers, in 3 of 3 steps, by the decisions that are set; left" in line
    assert "3 layers at level 0 (the decisions that are set leave it alone)" in line and not gpu.keys
    assert any("by the decisions that are set" in comment for comment in p.comments)


def test_what_does_not_fit_is_said_once(host, gpu, lines):
    _, p = host.generate([{**ON, "decisions": "+16x16 +8x8/64/2 -8x8/640/8 +99x99/32/2"}], seeds=(1, 2), batch_size=1)
    unnamed = "decisions does not name 16x16/32/2, so this was decided here"
    absent = "decisions names 8x8/640/8, which this model does not have at this size"
    for note in (unnamed, absent):
        assert lines.count(f"[ToMe] {note}") == 1 and f"ToMe: {note}" in p.comments
    assert p.extra_generation_params[LABEL] == "+16x16 -16x16/32/2 +8x8/64/2"
    assert not any("99x99" in line for line in lines), "of a size that was not made: another pass has it"


def test_where_nothing_is_left_to_merge_the_text_claims_nothing(host, gpu):
    _, p = host.generate([{**ON, "decisions": "-all"}])
    plain, _ = host.generate([])
    assert not p.extra_generation_params and not gpu.keys
    assert same(host.generate([{**ON, "decisions": "-all"}])[0], plain)


def test_without_a_gpu_the_text_tells_that_all_was_merged(host, tome, monkeypatch, tmp_path):
    made, p = host.generate([ON])
    read = _parse(p.processed.infotexts[0])
    assert read[LABEL] == FIRST
    gpu = MadeUpTimes(monkeypatch, tmp_path, *map(part, ("store", "layer", "decisions")))
    gpu.another(x16x16=False)
    assert not same(made, host.generate([ON])[0])
    assert same(made, host.generate([tome.infotext.read(read)])[0])


def test_named_levels_have_no_decisions(host, gpu):
    _, p = host.generate([{**ON, "levels": "0"}])
    assert LABEL not in p.extra_generation_params


def test_an_interrupted_picture_tells_what_was_decided_by_then(host, gpu):
    host.interrupt_at = 1
    _, p = host.generate([ON], steps=8)
    assert p.extra_generation_params[LABEL] == "+16x16 -16x16/32/2 +8x8/64/2"


def test_a_layer_that_is_decided_otherwise_in_the_midst_of_a_run_is_said(host, gpu, lines, monkeypatch):
    """A first measurement that fails for lack of memory is made again a minute later: here at once."""
    layer, store, calls = part("layer"), part("store"), []

    def measure(case, *_):
        calls.append(case.grid)
        if calls == [(16, 16)]:
            raise torch.OutOfMemoryError if hasattr(torch, "OutOfMemoryError") else torch.cuda.OutOfMemoryError
        return layer.Decision(80.0, 79.0 if case.grid == (16, 16) else 40.0, 0.0)

    monkeypatch.setattr(store, "RETRY", 0.0)
    monkeypatch.setattr(layer, "measure", measure)
    _, p = host.generate([ON])
    assert sum("16x16/32/2 changed from merged to left alone, or back, in the midst" in line for line in lines) == 1
    assert p.extra_generation_params[LABEL] == "+16x16 -16x16/32/2 +8x8/64/2"


def test_a_bad_text_becomes_the_default(tome):
    values, refused = tome.options.fit({**ON, "decisions": "+16x16/32/2", "levels": "0"})
    assert "decisions needs levels auto" in refused["decisions"] and values["decisions"] == ""
