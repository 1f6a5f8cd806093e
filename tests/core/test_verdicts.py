"""What becomes of a model's steps by what is known of their times."""

from __future__ import annotations

import copy

import pytest

from shared_tome import ToMeConfig
from shared_tome.autotune import verdicts
from shared_tome.autotune.decision_log import DecisionLog
from shared_tome.autotune.paying import AS_SET, Decision, Given
from shared_tome.autotune.verdicts import Verdict, Verdicts, verdict_of

PAYS, COSTS, LONG = Decision(2000.0, 1600.0, 0.0), Decision(1000.0, 1200.0, 0.0), Decision(4e5, 0.0, 0.0, busy=True)
SLOWER = "merging does not pay here: a step takes 1.0 ms without and 1.2 ms with it"


@pytest.mark.parametrize(
    "found, unpaid, speedup",
    [
        (None, None, None),
        (PAYS, None, 1.25),
        (COSTS, SLOWER, None),
        (LONG, None, None),  # no merged step was run
        (Given(True), None, None),
        (Given(False), AS_SET, None),
    ],
)
def test_a_verdict_says_what_becomes_of_steps(found, unpaid, speedup):
    verdict = Verdict(found)
    assert (verdict.unpaid, verdict.speedup) == (unpaid, speedup)
    assert verdict.judge.waits is (found is not LONG)
    assert verdict.judge is not verdict.judge  # it is written into


def test_what_is_measured_is_kept_for_steps_in_any_place_and_for_other_texts():
    config = ToMeConfig(start=0.2, end=0.9, exact_every=3, decisions="-32x32/320/8")
    log, asked = DecisionLog(), []

    def measured(config):
        asked.append(config)
        return COSTS

    assert verdict_of(log, config, (64, 64), measured).unpaid == SLOWER
    assert asked == [ToMeConfig(start=0.0, end=1.0)]
    assert log.text == "-64x64" and not log.follows


def test_what_is_set_is_not_measured():
    def measured(config):
        raise AssertionError

    for is_told in (True, False):
        log = DecisionLog()
        assert verdict_of(log, ToMeConfig(decisions="-64x64"), (64, 64), measured, is_told).unpaid == AS_SET
        assert log.text == "-64x64" and log.follows


def test_steps_of_which_nothing_is_known_are_told_or_not():
    told, untold = DecisionLog(), DecisionLog()
    for log in (told, untold):
        assert verdict_of(log, ToMeConfig(), (64, 64), lambda _: None, is_told=log is told) == Verdict()
    assert (told.text, untold.text) == ("+64x64", "")


def test_each_kind_of_steps_is_asked_for_once(monkeypatch):
    """Where nothing is known of one, again after a while, if it can be measured at all."""
    now = [100.0]
    monkeypatch.setattr(verdicts.time, "monotonic", lambda: now[0])
    known, asked = Verdicts(), []

    def of(kind, found, again=True):
        return known.of(kind, lambda: asked.append(kind) or Verdict(found), again).found

    for _ in range(2):
        assert [of("paying", PAYS), of("unknown", None), of("untimed", None, again=False)] == [PAYS, None, None]
    assert asked == ["paying", "unknown", "untimed"] and known.known("another") is None
    now[0] += verdicts.RETRY
    assert known.known("unknown") is None and known.known("untimed") == Verdict()
    twin = copy.deepcopy(known)
    assert [of("paying", COSTS), of("unknown", COSTS), of("untimed", COSTS, again=False)] == [PAYS, COSTS, None]
    assert asked[3:] == ["unknown"] and twin.known("unknown") is None and twin.known("paying").found == PAYS
