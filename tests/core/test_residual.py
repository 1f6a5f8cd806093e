"""What an exact step leaves for the steps behind it: which rows get which, and when nothing is kept."""

from __future__ import annotations

import threading

import pytest
import torch

from shared_tome import ToMeConfig
from shared_tome.autotune import layer
from shared_tome.merging.residual import ALONE, MOVING, TWICE, UNKNOWN, UNSEEN, Residuals, exact_told, why_no_effect

ROWS, TOKENS, CHANNELS, GRID = 2, 6, 4, (2, 3)


class Sampling:
    """A host in small: each evaluation asks for parts of the batch by name, split into calls as it likes."""

    def __init__(self, every=3):
        self.said = []
        self.residuals = Residuals(every, self.said.append)
        self.evaluation = 0

    def step(self, step, calls=(("a", "b"),), at=None, alike=None, draw=None, layer="layer", shape=(TOKENS, CHANNELS)):
        """{part: its rows' output}, None where nothing is kept. Whole: 100 x the step; drawn: less by (1 + step) x
        (1 + the draw)."""
        self.evaluation += 1
        found = {}
        for names in calls:
            draw_now = step if draw is None else draw
            evaluation = self.evaluation if at is None else at
            call = self.residuals.call(step, draw_now, evaluation, names, alike)
            if call is None:
                found.update(dict.fromkeys(names))
                continue
            x = torch.cat([torch.full((ROWS, *shape), 100.0 * step + ord(name)) for name in names])
            begun = call.begin(layer, x, GRID)
            out = call.attend(layer, lambda x=x, call=call: x - (1 + step) * (1 + call.draw), lambda x=x: x)
            call.end(layer)
            assert begun is bool(torch.equal(out, x)) or len(names) > 1
            found.update(zip(names, out.chunk(len(names)), strict=True))
        return {name: None if out is None else float(out.flatten()[0]) - ord(name) for name, out in found.items()}


def test_each_nth_step_is_exact_and_the_others_add_what_it_lacked():
    host = Sampling()
    # What step 4 lacks is 25, by its own draw; step 5 lacks 30.
    assert [host.step(step)["a"] for step in (4, 5, 6, 7, 8)] == [400, 495, 590, 700, 792]
    calls = [host.residuals.call(step, step, f"{step}'", ("a", "b")) for step in (8, 9, 10)]
    assert [call.draw for call in calls] == [7, 7, 10]
    assert [call.exact for call in calls] == [False, False, True]


def test_the_split_of_the_batch_does_not_matter():
    """Nor where it changes on the way, or a part of a call has nothing yet."""
    splits = [(("a", "b"),), (("b",), ("a",)), (("b", "a"),), (("a",), ("b",))]
    host, other = Sampling(), Sampling()
    for step in range(6):
        assert host.step(step, draw=step) == other.step(step, splits[step % 4], draw=step)
    host, other = Sampling(), Sampling()
    assert host.step(0, (("a",),)) == other.step(0, (("a",),))
    late = host.step(1, (("a", "b"),)), other.step(1, (("b",), ("a",)))
    assert late[0] == late[1]
    assert host.step(2) == other.step(2) and not host.said + other.said


def test_a_row_without_its_own_is_exact_beside_rows_that_have_theirs():
    residuals = Residuals(4, pytest.fail)
    x = torch.zeros(1, TOKENS, CHANNELS)
    call = residuals.call(0, 0, 0, ("a",))
    assert call.begin("layer", x, GRID) and call.exact
    call.attend("layer", lambda: x, lambda: x + 1)
    call = residuals.call(1, 1, 1, ("a", "b"))
    two = torch.cat((x, x))
    assert not call.begin("layer", two, GRID) and not call.exact
    out = call.attend("layer", lambda: two + 10, lambda: two + 50)
    assert torch.equal(out[:1], x + 11) and torch.equal(out[1:], x + 50)
    call = residuals.call(2, 2, 2, ("b", "a"))
    call.begin("layer", two, GRID)
    out = call.attend("layer", lambda: two, lambda: pytest.fail("both have theirs"))
    assert torch.equal(out[:1], x + 40) and torch.equal(out[1:], x + 1)


@pytest.mark.parametrize("change", ["layer", "shape", "dtype"])
def test_another_layer_shape_or_dtype_is_exact(change):
    residuals = Residuals(4, pytest.fail)
    for step in range(2):
        x = torch.zeros(1, TOKENS + 2 * (step and change == "shape"), CHANNELS)
        x = x.half() if step and change == "dtype" else x
        name = "another" if step and change == "layer" else "layer"
        call = residuals.call(step, step, step, ("a",))
        assert call.begin(name, x, GRID)
        assert torch.equal(call.attend(name, lambda x=x: x, lambda x=x: x + 1), x + 1)


def test_both_calls_of_an_exact_step_are_exact_and_the_last_one_counts():
    """Samplers as heun ask twice at a level."""
    residuals, x = Residuals(2, pytest.fail), torch.zeros(1, TOKENS, CHANNELS)
    lost = []
    for evaluation, (step, gap) in enumerate([(0, 1.0), (0, 2.0), (1, 9.0), (1, 9.0), (2, 4.0), (3, 9.0)]):
        call = residuals.call(step, 10 * evaluation, evaluation, ("a",))
        assert call.begin("layer", x, GRID) is (step % 2 == 0) is call.exact
        lost.append(float(call.attend("layer", lambda: x, lambda gap=gap: x + gap).mean()))
    assert lost == [1, 2, 2, 2, 4, 4]


def test_the_draw_stays_until_the_next_exact_step():
    residuals = Residuals(2, pytest.fail)
    draws = [(0, 5), (0, 6), (1, 7), (2, 8), (3, 9)]
    assert [residuals.call(step, draw, (step, draw), ("a",)).draw for step, draw in draws] == [5, 5, 5, 8, 8]


@pytest.mark.parametrize("calls", [[("a",), ("a",)], [("a", "b"), ("b",)], [("a", "a")]])
def test_names_that_come_twice_in_an_evaluation_end_it(calls):
    """Tiles: two parts of the picture that have one name. The second must not get what the first lacked."""
    host = Sampling()
    host.step(0, [("a", "b")])
    assert host.residuals.call(1, 1, "another", ("a", "b")) is not None
    assert None in host.step(2, calls).values() and host.said == [TWICE]
    assert host.step(3) == {"a": None, "b": None} and host.said == [TWICE] and not host.residuals._kept


def test_the_first_of_two_tiles_at_an_exact_step_leaves_nothing():
    host = Sampling()
    assert host.step(0, [("a",), ("a",)]) == {"a": None} and not host.residuals._kept


def test_two_layers_of_one_name_end_it():
    host, x = Sampling(), torch.zeros(1, TOKENS, CHANNELS)
    call = host.residuals.call(0, 0, 0, ("a",))
    for number in range(2):
        assert call.begin("layer", x, GRID) is (number == 0)
        out = call.attend("layer", lambda: x, lambda: x + 1)
        assert torch.equal(out, x + (number == 0))
    assert host.said == [TWICE] and not host.residuals._kept


def test_an_attention_that_is_not_met_ends_it():
    host, x = Sampling(), torch.zeros(1, TOKENS, CHANNELS)
    call = host.residuals.call(0, 0, 0, ("a",))
    call.begin("layer", x, GRID)
    call.end("layer")
    assert host.said == [UNSEEN] and not call.is_on


def test_a_step_that_is_not_known_ends_it():
    host = Sampling()
    assert host.residuals.call(None, 0, 0, ("a",)) is None
    assert host.said == [UNKNOWN] and host.residuals.call(1, 0, 1, ("a",)) is None


def test_another_ratio_is_exact():
    host = Sampling(every=9)
    for step, (ratio, exact) in enumerate([(0.5, True), (0.5, False), (0.6, True), (0.6, False)]):
        x = torch.zeros(1, TOKENS, CHANNELS)
        call = host.residuals.call(step, step, step, ("a",), ratio)
        assert call.begin("layer", x, GRID) is exact and call.draw == 2 * (step // 2)
        call.attend("layer", lambda x=x: x, lambda x=x: x + 1)


def test_memory_is_given_back():
    host = Sampling()
    for forget in (host.residuals.forget, host.residuals.end):
        host.step(0)
        assert host.residuals._kept
        forget()
        assert not host.residuals._kept
    assert host.residuals.call(1, 1, 1, ("a",)) is None
    host = Sampling()
    host.step(0)
    first = next(iter(host.residuals._kept.values()))
    host.step(3)
    assert len(host.residuals._kept) == 2 and all(first is not part for part in host.residuals._kept.values())


def test_no_graph_is_kept():
    host = Sampling()
    x = torch.zeros(1, TOKENS, CHANNELS, requires_grad=True)
    call = host.residuals.call(0, 0, 0, ("a",))
    call.begin("layer", x, GRID)
    assert call.attend("layer", lambda: x * 1, lambda: x * 2).requires_grad
    assert not any(part.requires_grad for part in host.residuals._kept.values())


def test_a_sampling_of_exact_steps_alone_says_so():
    host = Sampling()
    host.step(0)
    host.residuals.end()
    assert host.said == [ALONE]
    host = Sampling()
    host.step(0)
    host.step(1)
    host.residuals.end()
    assert host.said == []


def test_each_stage_of_a_moving_ratio_may_be_one_exact_step():
    host = Sampling()
    for step, ratio in enumerate((0.75, 0.6, 0.45)):
        host.step(step, alike=ratio)
    host.residuals.end()
    assert host.said == [MOVING] and "ratio at the end" in MOVING and "ratio at the end" not in ALONE


def test_what_is_told_and_who_does_without():
    assert [exact_told(n)[:18] for n in (2, 3, 4)] == ["exact in every 2nd", "exact in every 3rd", "exact in every 4th"]
    assert why_no_effect(ToMeConfig()) is None and why_no_effect(ToMeConfig(), transformer=True) is None
    for method in ("sample", "downsample", "auto"):
        assert why_no_effect(ToMeConfig(method=method, exact_every=3)) is None
    for method in ("merge", "merge_keys", "merge_queries", "prune", "multires"):
        assert method in why_no_effect(ToMeConfig(method=method, exact_every=3))
        assert Residuals.of(ToMeConfig(method=method, exact_every=3), lambda _: None) is None
    assert "transformers" in why_no_effect(ToMeConfig(exact_every=3), transformer=True)
    assert Residuals.of(ToMeConfig(exact_every=0), pytest.fail) is None


def test_one_is_refused():
    with pytest.raises(ValueError, match=r"exact_every must be 0 \(off\) or a whole number in 2 to 16, got 1"):
        ToMeConfig(exact_every=1)
    for value in (17, -1, 2.5, True):
        with pytest.raises(ValueError, match="exact_every"):
            ToMeConfig(exact_every=value)


def test_what_a_layer_is_decided_by_does_not_change():
    given = (64, 64), 320, 8, torch.float16
    keys = {
        layer._case(*given, ToMeConfig(exact_every=every, own_token=own), "torch", (), "").key
        for every in (0, 4)
        for own in (False,)
    }
    assert len(keys) == 1
    case = layer._case(*given, ToMeConfig(exact_every=4), "torch", (), "")
    assert case.config == layer._case(*given, ToMeConfig(), "torch", (), "").config


def test_memory_may_be_given_back_in_the_midst_of_a_call():
    """Python frees a prompt that a cycle holds whenever it likes, and with it what was kept (scripts/residuals.py)."""
    host = Sampling()
    host.step(0)

    class Frees:
        def __ne__(self, other):
            host.residuals.forget()
            return True

    found = []
    thread = threading.Thread(target=lambda: found.append(host.residuals.call(1, 1, Frees(), ("a", "b"))), daemon=True)
    thread.start()
    thread.join(10)
    assert found and found[0].exact
