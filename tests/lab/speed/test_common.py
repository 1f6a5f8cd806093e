"""What all benchmarks share: rows that a later run goes on from, turns, budgets."""

from __future__ import annotations

import pytest

from lab import timing
from lab.speed import common
from lab.speed.common import options_of
from shared_tome.methods import PRESETS


def test_a_store_keeps_what_an_earlier_run_measured(tmp_path):
    path = tmp_path / "rows.csv"
    first = common.Store(path, ("name", "ratio"))
    first.add({"name": "a", "ratio": 0.9375, "us": 12.3456})
    first.add({"name": "a", "ratio": 0.9375, "us": 99.0})  # the same keys: left out
    assert path.read_text() == "name,ratio,us\na,0.9375,12.35\n"
    again = common.Store(path, ("name", "ratio"))
    assert again.has(name="a", ratio=0.9375) and not again.has(name="a", ratio=0.5)
    again.add({"name": "b", "ratio": 0.5, "us": 1.0, "remark": "new column"})
    assert path.read_text().splitlines() == ["name,ratio,us,remark", "a,0.9375,12.35,", "b,0.5,1.0,new column"]


def test_a_file_of_another_benchmark_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("shape,us\nx,1\n")
    with pytest.raises(ValueError, match="has no column 'name'"):
        common.Store(path, ("name",))


def test_turns_take_turns():
    order = []
    turns = {name: lambda name=name: order.append(name) or [1.0] for name in "abc"}
    found = timing.take_turns(turns, seconds=0.0, least=3)
    assert "".join(order) == "abccbaabc" and found == {name: [1.0] * 3 for name in "abc"}
    assert len(timing.take_turns(turns, seconds=60.0, most=4)["a"]) == 4


def test_a_budget_ends():
    assert common.Budget(0).spent and not common.Budget(None).spent and not common.Budget(10).spent


def test_the_attention_asked_for_comes_first():
    for name, kernel in common.BACKENDS.items():
        order = common.priority(name)
        assert order[0] == kernel and len(set(order)) == len(common.BACKENDS)
    assert common.priority("default") == list(common.BACKENDS.values())


def test_the_spread_of_one_and_of_many():
    assert timing.spread([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0}
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}


def test_a_speedup_is_of_turns():
    """A machine at half its speed for most of the time: the medians say 0.5x, the turns 2x."""
    base, times = [1.0, 1.0, 2.0, 2.0, 2.0], [0.5, 0.5, 1.0, 1.0, 1.0]
    assert common.speedup(base, times) == {"speedup": "2.000", "speedup_p20": "2.000", "speedup_p80": "2.000"}
    assert common.speedup([1, 1, 1], [1, 0.5, 2]) == {
        "speedup": "1.000", "speedup_p20": "0.700", "speedup_p80": "1.600"
    }  # fmt: skip
    with pytest.raises(ValueError):
        common.speedup([1.0], [1.0, 1.0])


def test_a_variants_options_are_in_its_name():
    assert options_of("sample 0.9375 from 0.1") == {
        "method": "sample", "ratio": 0.9375, "start": 0.1, "own_token": False
    }  # fmt: skip
    assert (
        options_of("sample 0.75, own token")["own_token"] and not options_of("sample 0.75, unweighted")["proportional"]
    )
    assert options_of("merge 0.5, shared")["share_match"] and options_of("multires 0.77")["method"] == "multires"
    assert options_of("Balanced, levels auto") == {**PRESETS["Balanced"].options, "levels": "auto"}
    with pytest.raises(KeyError, match="own tokens"):
        options_of("sample 0.75, own tokens")
