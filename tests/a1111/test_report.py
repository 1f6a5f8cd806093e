"""The report: a line in the log, and in the picture's text where the setting says so."""

from __future__ import annotations

import pytest

from . import models
from .host import FIRST
from .test_forge import _Loaded
from .test_generation import _use_hypertile
from .test_options import _parse

ON = [{"ratio": 0.5, "min_tokens": 0, "own_token": False}]
TEXT = "in the log and the picture's text"


@pytest.fixture
def lines(tome, monkeypatch):
    """What the log gets."""
    found = []
    monkeypatch.setattr(tome.notes.logger, "info", lambda text, *args: found.append(text % args))
    return found


def test_the_log_gets_one_line_a_picture(host, lines):
    _, p = host.generate(ON)
    assert lines == [
        "[ToMe] sample 0.5, level 0 (16x16): 256 to 128 tokens in 3 layers, level 1 (8x8): 64 to 32 tokens in 4 layers"
        ", in 3 of 3 steps"
    ]
    assert list(p.comments) == [lines[0].replace("[ToMe] ", "ToMe: ")]
    assert "ToMe report" not in p.extra_generation_params


def test_what_is_left_alone_is_told_with_its_reason(host, lines):
    host.generate([{**ON[0], "min_tokens": 100}])
    assert lines[0].endswith("; left alone: 4 layers at level 1 (fewer than min tokens 100)")
    host.generate([{**ON[0], "levels": "3"}])
    assert "nothing was merged; left alone: 7 layers at levels 0, 1 (its level is not one of levels 3)" in lines[1]
    assert lines[1].endswith(". To change that: set levels to auto")


def test_steps_without_merging_are_counted(host, lines):
    host.generate([{**ON[0], "start": 0.5}], steps=4)
    assert lines[0].endswith("in 2 of 4 steps")
    host.generate(ON, steps=1)
    assert lines[1].endswith("in 1 of 1 step")


def test_somebody_elses_attention_is_told(host, lines):
    _use_hypertile(host.shared.sd_model.model.diffusion_model, True)
    host.generate(ON)
    report = lines[-1]
    assert "nothing was merged" in report
    assert (
        "left alone: 7 layers at levels 0, 1 (ToMe skips a self-attention that another node or extension replaces"
        in report
    )


def test_layers_are_counted_by_blocks(host, tome):
    _, p = host.generate(ON)
    names = {(layer.where, layer.part) for run in p.tome_state.runs.values() for layer in run.tally.layers()}
    assert names == {
        ("input block 1", 0), ("input block 3", 0), ("middle block 0", 0), ("output block 0", 0),
        ("output block 1", 0), ("output block 2", 0), ("output block 3", 0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("input_blocks.4.1.transformer_blocks.0", ("input block 4", 0)),
        ("input_blocks.8.1.transformer_blocks.9", ("input block 8", 9)),
        ("middle_block.1.transformer_blocks.2", ("middle block 0", 2)),
        ("output_blocks.11.1.transformer_blocks.1", ("output block 11", 1)),
        ("layers.3", ("layers.3", 0)),
        ("", ("unnamed block", 0)),
    ],
)
def test_blocks_are_named_as_in_comfyui(tome, name, place):
    assert tome.block.block_place(name) == place


def test_the_hires_pass_stands_in_the_same_line(host, lines):
    host.generate([{**ON[0], "hires_ratio": 0.25}], enable_hr=True)
    (line,) = lines
    first, second = line.split("; hires pass: ")
    assert "256 to 128" in first and second.startswith("sample 0.25, level 0 (24x24): 576 to 432")


def test_a_pass_that_is_off_is_not_told(host, lines):
    host.generate([{**ON[0], "hires_ratio": 0.0}], enable_hr=True)
    assert len(lines) == 1 and "hires" not in lines[0]
    host.generate([{**ON[0], "ratio": 0.0, "hires_ratio": 0.5}], enable_hr=True)
    assert lines[1].startswith("[ToMe] hires pass: ")


def test_batches_of_one_generation_say_the_same_once(host, lines):
    host.generate(ON, seeds=(1, 2, 3, 4), batch_size=2)
    assert len(lines) == 1


def test_the_pictures_text_gets_it_and_gives_it_back(host, tome, lines):
    host.opts.data["tome_report"] = TEXT
    _, p = host.generate(ON, seeds=(1, 2), batch_size=1)
    for text in p.processed.infotexts:
        read = _parse(text)
        assert read["ToMe report"] == lines[0].removeprefix("[ToMe] ") and ", " in read["ToMe report"]
        assert tome.infotext.read(read) == tome.infotext.read(
            _parse(f"ToMe ratio: 0.5, ToMe min tokens: 0, ToMe own token: False, ToMe decisions: {FIRST}")
        )


def test_a_request_may_ask_for_it(host, lines):
    _, p = host.generate(ON, override_settings={"tome_report": TEXT})
    assert p.extra_generation_params["ToMe report"] in lines[0]


def test_calls_that_are_alike_are_told_once(host, tome, monkeypatch):
    """What a report costs: a model's layers once a pass, whatever the number of steps."""
    told, tally = [], type(tome.sampling.Run(tome.core.ToMeConfig()).tally)
    add = tally.add
    monkeypatch.setattr(tally, "add", lambda self, layer, *more: (told.append(layer.where), add(self, layer, *more)))
    host.generate(ON, steps=9)
    assert len(told) == 7
    host.generate([{**ON[0], "start": 0.5, "hires_ratio": 0.25}], steps=9, enable_hr=True)
    assert len(told) == 3 * 7


def test_no_report_says_nothing(host, lines):
    host.opts.data["tome_report"] = "no"
    merged, p = host.generate(ON)
    assert not lines and not p.comments
    host.opts.data["tome_report"] = TEXT
    again, _ = host.generate(ON)
    assert (merged[0] == again[0]).all(), "reporting changes the picture"


def test_off_and_models_that_are_not_served_report_nothing(host, lines):
    host.opts.data["tome_report"] = TEXT
    host.generate()
    host.generate([True, 0.0])
    assert not lines
    host.shared.sd_model.applied_token_merged_ratio = 0.4
    _, p = host.generate(ON)
    assert len(lines) == 1 and "built-in" in lines[0] and not p.extra_generation_params


def test_an_impossible_setting_is_the_default(host, lines):
    host.opts.data["tome_report"] = "loudly"
    host.generate(ON)
    assert len(lines) == 2 and "not possible" in lines[0] and "256 to 128" in lines[1]


def test_a_model_of_another_configuration_in_the_middle(host, lines):
    host.generate(ON, steps=4, refiner=models.small_model(7, mult=(1, 1, 2)))
    assert "level 2 (4x4): 16 to 8 tokens" in lines[0]


@pytest.mark.parametrize("tells", [False, True], ids=["forge", "reforge"])
def test_forge_reports_too(host, lines, tells):
    host.shared.sd_model, host.forge = _Loaded(tells), True
    host.generate([{**ON[0], "hires_ratio": 0.25}], enable_hr=True)
    first, second = lines[0].split("; hires pass: ")
    assert "256 to 128 tokens in 1 layer, level 1 (8x8): 64 to 32 tokens in 1 layer, in 3 of 3 steps" in first
    assert "576 to 432 tokens in 1 layer" in second and second.endswith("in 2 of 2 steps")
