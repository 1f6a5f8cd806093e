"""The report's data: what a tally counts, and the two forms that it is read in."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_tome import ToMeConfig
from shared_tome.core.grid import grid_at
from shared_tome.core.schedule import serves_layer
from shared_tome.inspect.reasons import NO_WHOLE_TOKEN, capped, why_not_served
from shared_tome.inspect.report import CallTally, StepTime, Tally
from shared_tome.merging.plan import Plan
from shared_tome.methods import LEVELS

ROOT, PACKAGES = Path(__file__).parents[2], ("shared_tome", "comfy_tome", "a1111_extension")
FULL = (64, 64)


def plan(kept, tokens=4096):
    return Plan(1, tokens, kept, "cpu")


def filled(steps=3, ratio=0.75, **options):
    """Two layers merged at level 0, one of level 1 left alone, in each step."""
    tally = Tally(ToMeConfig(ratio=ratio, **options), of_steps=4)
    for step in range(steps):
        tally.call(step, ratio)
        call = CallTally(tally, FULL)
        call.layer("input block 1", FULL, plan(1024))
        call.left_alone("fewer than min tokens 2048", "input block 4", (32, 32))
        call.layer("output block 9", FULL, plan(1024))
    return tally


def test_text_says_all_that_was_counted():
    text = filled().report().text()
    assert text.startswith("ToMe: method sample, ratio 0.75, seed 0\n3 of 4 steps, merged in 3; 3 calls of the model")
    assert "- level 0 (64x64): 4096 to 1024 tokens (-75%), 2 layers: input block 1, output block 9" in text
    assert "- level 1 (32x32), 1024 tokens, 1 layer: fewer than min tokens 2048 (input block 4)" in text


def test_a_layer_behind_one_that_is_left_alone_in_some_calls_is_one_layer():
    """Perturbed attention replaces an attention in every second call; layers behind it have other numbers then."""
    for replaced in ((False, True), (True, False)):
        tally = Tally(ToMeConfig(ratio=0.75))
        for is_replaced in replaced:
            tally.call(0, 0.75)
            call = CallTally(tally, FULL)
            call.layer("input block 1", FULL, plan(1024))
            if is_replaced:
                call.left_alone("another's", "middle block 0", FULL)
            else:
                call.layer("middle block 0", FULL, plan(1024))
            call.layer("output block 0", FULL, plan(1024))
        report = tally.report()
        assert "4096 to 1024 tokens in 3 layers" in report.line()
        assert sorted((one.number, one.where, one.calls) for one in report.merged) == [
            (0, "input block 1", 2), (1, "middle block 0", 1), (2, "output block 0", 2),
        ]  # fmt: skip


def test_layers_of_one_name_in_a_call_are_several():
    """Some models do not tell the numbers of their blocks."""
    tally = Tally(ToMeConfig(ratio=0.75))
    for _ in range(2):
        tally.call(0, 0.75)
        call = CallTally(tally, FULL)
        for _ in range(3):
            call.layer("unnamed block", FULL, plan(1024))
    assert [(one.number, one.calls) for one in tally.report().merged] == [(0, 2), (1, 2), (2, 2)]


def test_one_of_a_thing_is_no_plural():
    tally = Tally(ToMeConfig(ratio=0.75), of_steps=1)
    tally.call(0, 0.75)
    call = CallTally(tally, (2, 2))
    call.layer("block 1", (2, 2), plan(1, tokens=4))
    call.left_alone("fewer than min tokens 2", "block 2", (1, 1))
    report = tally.report()
    text = report.text()
    assert "1 step, merged in 1; 1 call of the model" in text
    assert "4 to 1 token (-75%), 1 layer: block 1" in text
    assert "- level 1 (1x1), 1 token, 1 layer: fewer" in text
    assert report.line() == "sample 0.75, level 0 (2x2): 4 to 1 token in 1 layer"


def test_one_of_several_has_the_plural_of_all():
    tally = Tally(ToMeConfig(), of_steps=4)
    tally.call(0, 0.75)
    CallTally(tally, (2, 2)).layer("block 1", (2, 2), plan(1, tokens=4))
    CallTally(tally, (2, 2)).layer("block 1", (2, 2), plan(2, tokens=4))
    assert "1 of 4 steps, merged in 1; 1 call of the model" in tally.report().text()
    assert "4 to 1...2 tokens" in tally.report().line()


@pytest.mark.parametrize(("asked", "said"), [(1, "1 of 1 call"), (2, "2 of 2 calls")])
def test_calls_that_another_node_answered(asked, said):
    tally = Tally(ToMeConfig())
    for step in range(asked):
        tally.ask(step, 0.5)
    assert tally.report().notes == (f"another node answered {said} without the model",)


def test_json_holds_the_numbers():
    time = StepTime(40.0, 25.0, 5, 2, 3, 0.75, "cpu")
    data = json.loads(json.dumps(filled().report(time, ["a note"]).to_dict()))
    assert data["options"]["method"] == "sample" and data["options"]["stride"] == [2, 2]
    assert (data["steps"], data["of_steps"], data["merged_steps"], data["calls"]) == (3, 4, 3, 3)
    first, left, last = data["layers"]
    assert first == {
        "where": "input block 1", "part": 0, "level": 0, "grid": [64, 64], "number": 0, "before": 4096,
        "after": [1024, 1024], "calls": 3, "reason": "", "saves_us": None,
    }  # fmt: skip
    assert left["reason"] == "fewer than min tokens 2048" and left["after"] is None and left["level"] == 1
    assert last["number"] == 1
    assert (data["time"]["without_ms"], data["time"]["with_ms"], data["time"]["speedup"]) == (40.0, 25.0, 1.6)
    assert data["notes"] == ["a note"]


def test_line_for_logs():
    time = StepTime(40.0, 25.0, 5, 1, 3, 0.75, "cpu")
    assert filled().report(time).line() == (
        "sample 0.75, level 0 (64x64): 4096 to 1024 tokens in 2 layers, 40 to 25 ms a step"
    )
    assert "nothing was merged" in Tally(ToMeConfig()).report().line()
    assert Tally(ToMeConfig(ratio=0.5, ratio_end=0.0)).report().line().startswith("sample 0.5 to 0, ")


def test_time_says_what_was_measured():
    text = filled().report(StepTime(40.0, 25.0, 5, 2, 3, 0.75, "cpu")).text()
    assert "A step, 2 calls: 40 ms without, 25 ms with ToMe: 1.60x (step 3 at ratio 0.75, median of 5, cpu)" in text


def test_a_ratio_that_moves_shows_its_range():
    tally = Tally(ToMeConfig(ratio=0.5, ratio_end=0.0))
    for step, kept in enumerate((2048, 2560, 3072)):
        tally.call(step, 0.5)
        CallTally(tally, FULL).layer("input block 1", FULL, plan(kept))
    (layer,) = tally.report().merged
    assert layer.after == (2048, 3072) and layer.calls == 3
    assert "4096 to 2048...3072 tokens" in tally.report().text()
    assert "ratio 0.5 to 0," in tally.report().text()


def test_steps_in_which_nothing_was_merged():
    tally = Tally(ToMeConfig(start=0.5), of_steps=4)
    for step, ratio in enumerate((0.0, 0.0, 0.75, 0.75)):
        tally.call(step, ratio)
        tally.call(step, ratio)
    report = tally.report()
    assert (report.steps, report.merged_steps, report.calls) == (4, 2, 8)
    assert "4 steps, merged in 2, from start 0.5 to end 1; 8 calls" in report.text()
    assert "Nothing was merged." in report.text()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"start": 0.8}, "no step of this run lies between start 0.8 and end 1"),
        (
            {"ratio": 0.0, "ratio_end": 0.5, "end": 0.5},
            "the ratio is 0 at each step of this run: it moves from 0 to 0.5 between start 0 and end 0.5",
        ),
    ],
)
def test_a_run_without_a_step_to_merge_in_says_so(options, why):
    tally = Tally(ToMeConfig(**options))
    assert "Nothing was merged.\n" in tally.report().text() + "\n"  # no step was run
    tally.call(0, 0.0)
    assert f"Nothing was merged: {why}." in tally.report().text()
    tally.call(1, 0.5)
    CallTally(tally, FULL).left_alone("too small", "block 1", FULL)
    assert why not in tally.report().text() and "too small" in tally.report().text()


def test_steps_in_which_all_layers_were_left_alone():
    tally = Tally(ToMeConfig(), of_steps=4)
    for step in range(3):
        tally.call(step, 0.5)
        call = CallTally(tally, FULL, step)
        call.left_alone("another node's", "block 1", FULL)
        if step == 1:
            call.layer("block 2", FULL, plan(1024))
    tally.call(3, 0.5)  # of which no layer was told
    assert tally.report().merged_steps == 2
    tally = Tally(ToMeConfig(), of_steps=1)
    tally.call(0, 0.5)
    CallTally(tally, FULL).left_alone("another node's", "block 1", FULL)  # a host that tells alike calls once
    assert tally.report().merged_steps == 0


def test_the_cap_is_said():
    assert capped(ToMeConfig(method="merge", ratio=0.75)) is None
    said = capped(ToMeConfig(method="merge", ratio=0.9))
    assert said == "ratio 0.9 is more than method merge can take at stride 2x2: 0.75 is what it does"
    report = Tally(ToMeConfig(method="merge", ratio=0.9)).report()
    assert said in report.text()
    assert report.to_dict()["capped"] and report.to_dict()["ratio_cap"] == 0.75


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "sample"}, "ratio 1 is more than method sample can take: 0.984375 is what it does"),
        ({"method": "multires"}, "ratio 1 is more than method multires can take: 0.9375 is what it does"),
        (
            {"method": "downsample"},
            "ratio 1 is more than method downsample can take at stride 2x2: 0.75 is what it does",
        ),
        (
            {"method": "merge", "partition": "alternate"},
            "ratio 1 is more than method merge can take with partition alternate: 0.5 is what it does",
        ),
    ],
    ids=str,
)
def test_what_sets_the_cap_is_said(options, what):
    assert capped(ToMeConfig(ratio=1.0, **options)) == what
    assert capped(ToMeConfig(ratio=0.25, ratio_end=1.0, **options)) == what  # a moving ratio comes there too


def test_a_layer_from_which_nothing_goes():
    tally = Tally(ToMeConfig())
    call = CallTally(tally, FULL)
    assert call.layer("a", FULL, None) == 0
    assert call.layer("b", FULL, plan(1024)) == 1
    assert [layer.reason for layer in tally.layers()] == [NO_WHOLE_TOKEN, ""]


def test_all_hosts_say_the_same_sentence():
    """It stands in one place."""
    code = (path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    assert [path.name for path in code if f'"{NO_WHOLE_TOKEN}"' in path.read_text("utf-8")] == ["reasons.py"]


@given(
    st.sampled_from(LEVELS),
    st.integers(0, 4096),
    st.tuples(st.integers(1, 65), st.integers(1, 65)),
    st.integers(0, 3),
)
def test_a_reason_is_given_just_where_a_layer_is_not_served(levels, min_tokens, full, level):
    config, grid = ToMeConfig(levels=levels, min_tokens=min_tokens), grid_at(full, level)
    assert (why_not_served(config, grid, full) is None) == serves_layer(config, grid, full)


def test_several_threads_lose_nothing():
    tally = Tally(ToMeConfig())

    def fill():
        for step in range(200):
            tally.call(step, 0.5)
            CallTally(tally, FULL).layer("input block 1", FULL, plan(1024))

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.calls == 800 and tally.layers()[0].calls == 800 and tally.steps == list(range(200))


@pytest.mark.parametrize("where", ["Flux", "unnamed block", ""])
def test_any_name_of_a_block(where):
    tally = Tally(ToMeConfig())
    CallTally(tally, FULL).layer(where, FULL, plan(1024))
    assert where in tally.report().text()
