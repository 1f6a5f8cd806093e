"""One frozen dataclass holds every option with its range, and says what is wrong."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from shared_tome import METHODS, ToMeConfig
from shared_tome.methods import LEVELS, MAX_SEED

OPTIONS = ToMeConfig.options()
NUMBERS = [name for name, option in OPTIONS.items() if option.minimum is not None]
CHOICES = [name for name, option in OPTIONS.items() if option.choices is not None]
FLAGS = [field.name for field in dataclasses.fields(ToMeConfig) if isinstance(field.default, bool)]
TEXTS = [name for name, option in OPTIONS.items() if option.check is not None]
NO_NUMBERS = ["x", "0.5", None, True, False, [], {}, math.nan, math.inf, -math.inf, 10**400, -(10**400), 1j]


def refused(name, value, **options):
    """The message of the ValueError."""
    with pytest.raises(ValueError) as caught:
        ToMeConfig(**{name: value, **options})
    return str(caught.value)


def test_every_option_is_a_number_a_choice_a_flag_or_a_checked_text():
    assert sorted(NUMBERS + CHOICES + FLAGS + TEXTS) == sorted(OPTIONS) and TEXTS == ["decisions"]
    numbers = {"ratio", "stride", "seed", "start", "end", "ratio_end", "min_tokens", "whole", "half", "exact_every"}
    assert numbers == set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_another_package(name):
    """numpy's, as a sweep over options has them."""
    numpy = pytest.importorskip("numpy")
    option = OPTIONS[name]
    kind = numpy.int64 if isinstance(option.minimum, int) else numpy.float32
    given, usual = (getattr(ToMeConfig(**{name: value}), name) for value in (kind(option.minimum), option.minimum))
    assert repr(given) == repr(usual)
    assert repr(kind(-2)) in refused(name, kind(-2))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range(name):
    option = OPTIONS[name]
    whole = isinstance(option.minimum, int)
    little = 1 if whole else 1e-6
    for value in [option.minimum - little, option.maximum + little, option.minimum - 100, option.maximum * 2 + 100]:
        message = refused(name, value)
        for word in (name, repr(value), f"{option.minimum} to {option.maximum}"):
            assert word in message
    for value in NO_NUMBERS + ([1.5] if whole else []):
        message = refused(name, value)
        for word in (name, repr(value), f"{option.minimum} to {option.maximum}"):
            assert word in message


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_a_range_are_in_it(name):
    option = OPTIONS[name]
    more = {"start": {"end": 1.0}, "end": {"start": 0.0}, "whole": {"half": 0.0}}.get(name, {})
    for value in (option.minimum, option.maximum):
        got = getattr(ToMeConfig(**{name: value}, **more), name)
        assert got == ((value, value) if option.parts else value)
        assert type(got) is type(getattr(ToMeConfig(), name))


def test_one_side_of_the_stride_out_of_range():
    for value in [(0, 2), (2, 9), (2, 2.5), (2, "2"), (2, None), (True, 2), (2, math.nan)]:
        bad = next(part for part in value if part is True or part not in (2,))
        message = refused("stride", value)
        assert "stride" in message and repr(bad) in message and "1 to 8" in message
    for value in [(2,), (2, 2, 2), "22"]:
        message = refused("stride", value)
        assert "stride" in message and repr(value) in message and "1 to 8" in message


def test_stride_forms():
    for value in (3, 3.0, [3, 3], (3.0, 3)):
        stride = ToMeConfig(stride=value).stride
        assert stride == (3, 3) and all(type(part) is int for part in stride)


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    for value in ("nonsense", "", None, 1.5, True, b"auto", -1):
        message = refused(name, value)
        assert name in message and repr(value) in message or name == "levels" and str(value) in message
        if name != "levels":
            assert all(choice in message for choice in OPTIONS[name].choices)
    for choice in OPTIONS[name].choices:
        assert getattr(ToMeConfig(**{name: choice}), name) == choice


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name):
    for value in ("yes", None, 2, -1, 0.5, [], "false"):
        message = refused(name, value)
        assert name in message and repr(value) in message and "true or false" in message
    for value in (True, False, 1, 0):
        assert getattr(ToMeConfig(**{name: value, "method": "merge"}), name) is bool(value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("auto", "auto"),
        ("0", "0"),
        (0, "0"),
        (3, "3"),
        ("1, 0", "0,1"),
        ("2,0,2", "0,2"),
        ((0, 1), "0,1"),
        ([2, 1], "1,2"),
        ({3, 0}, "0,3"),
        (frozenset({1}), "1"),
        (("1", 2), "1,2"),
    ],
)
def test_levels_forms(given, kept):
    made = ToMeConfig(levels=given)
    assert made.levels == kept
    assert made.level_set == (None if kept == "auto" else frozenset(int(part) for part in kept.split(",")))


NO_LEVELS = ["4", 4, -1, "0,4", "", ",", "0,,1", "x", (), (0, 9), (0, "x"), [1.5], True, "²", "1.0", "-1"]


@pytest.mark.parametrize("value", NO_LEVELS)
def test_levels_out_of_range(value):
    message = refused("levels", value)
    assert "levels" in message and "auto" in message and "0 to 3" in message or "0,1,2,3" in message


def test_ratio_end_stays_or_lies_in_range():
    assert ToMeConfig(ratio_end=-1).ratio_end == -1.0 and ToMeConfig(ratio_end=0).ratio_end == 0.0
    for value in (-0.5, -0.999, -1e-9):
        message = refused("ratio_end", value)
        assert "ratio_end" in message and repr(value) in message and "0 to 1" in message


@pytest.mark.parametrize("name", ["whole", "half"])
def test_shares_by_hand_are_the_ratios_or_lie_in_range(name):
    assert getattr(ToMeConfig(), name) == getattr(ToMeConfig(**{name: -1}), name) == -1.0
    for value in (-0.5, -1e-9):
        message = refused(name, value)
        assert name in message and repr(value) in message and "0 to 1" in message
    ours = ToMeConfig(method="multires", **{name: 0.0})
    assert ours.shares_by_hand and not ours.replace(method="sample").shares_by_hand
    assert not ToMeConfig(method="multires").shares_by_hand


def test_shares_by_hand_add_up_to_one_at_most():
    message = refused("whole", 0.7, half=0.5)
    for words in ("whole 0.7", "half 0.5", "0 to 1", "add up to 1"):
        assert words in message
    for whole, half in ((0.7, 0.3), (0.1, 0.9), (1.0, 0.0), (0.9, 0.1), (1.0, -1.0)):
        assert ToMeConfig(whole=whole, half=half).whole == whole


def test_start_after_end():
    message = refused("start", 0.6, end=0.5)
    assert "start" in message and "end" in message and "0.6" in message and "0.5" in message
    assert ToMeConfig(start=0.5, end=0.5).is_off


@pytest.mark.parametrize("name", ["cross_attention", "mlp"])
@pytest.mark.parametrize("method", METHODS)
def test_what_needs_a_match(method, name):
    if METHODS[method].matches:
        assert getattr(ToMeConfig(**{name: True, "method": method}), name)
        return
    message = refused(name, True, method=method)
    assert name in message and method in message and "merge_keys" in message
    assert not getattr(ToMeConfig(**{name: False, "method": method}), name)


def test_frozen_hashable_and_equal_by_value():
    made = ToMeConfig(ratio=0.25, stride=[2, 3])
    for name in OPTIONS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, name, getattr(made, name))
    assert made == ToMeConfig(ratio=0.25, stride=(2, 3)) and hash(made) == hash(ToMeConfig(ratio=0.25, stride=(2, 3)))
    assert made != ToMeConfig(ratio=0.5, stride=(2, 3))


def test_replace():
    made = ToMeConfig(ratio=0.25)
    other = made.replace(method="merge", ratio=0.5)
    assert (other.ratio, other.method, made.ratio, made.method) == (0.5, "merge", 0.25, "sample")
    with pytest.raises(ValueError, match="ratio"):
        made.replace(ratio=2)
    with pytest.raises(TypeError):
        made.replace(ration=0.5)


@pytest.mark.parametrize(
    ("options", "off", "scheduled"),
    [
        ({}, False, False),
        ({"ratio": 0}, True, False),
        ({"ratio": 0, "ratio_end": 0}, True, True),
        ({"ratio": 0, "ratio_end": 0.5}, False, True),
        ({"ratio": 0.5, "ratio_end": 0}, False, True),
        ({"start": 0.2}, False, True),
        ({"end": 0.8}, False, True),
        ({"start": 0.3, "end": 0.3}, True, True),
    ],
)
def test_is_off_and_is_scheduled(options, off, scheduled):
    made = ToMeConfig(**options)
    assert (made.is_off, made.is_scheduled) == (off, scheduled)


def test_ratio_cap():
    assert ToMeConfig(method="sample", stride=(1, 1)).ratio_cap == 63 / 64
    assert ToMeConfig(method="merge", stride=(4, 2)).ratio_cap == 7 / 8
    assert ToMeConfig(method="merge", stride=(1, 1)).ratio_cap == 0.0
    assert ToMeConfig(method="merge", stride=(4, 4), partition="alternate").ratio_cap == 0.5
    assert ToMeConfig(method="downsample", stride=(4, 2), partition="alternate").ratio_cap == 7 / 8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("partition", OPTIONS["partition"].choices)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (4, 2), (8, 8)])
def test_ratio_cap_is_what_matching_reaches(method, partition, stride):
    from shared_tome import match_tokens

    from .helpers import tokens

    made = ToMeConfig(method=method, partition=partition, stride=stride, ratio=1.0)
    assert match_tokens(tokens(1, (16, 16), 2), (16, 16), made).ratio == made.ratio_cap


def test_every_option_has_words_for_people():
    for name, option in OPTIONS.items():
        assert option.label and option.label[0].isupper(), name
        assert len(option.help) > 20 and option.help.endswith("."), name
        if option.minimum is not None:
            assert option.minimum < option.maximum and option.step > 0, name
    for name, method in METHODS.items():
        assert f"{name}: " in OPTIONS["method"].help and method.summary in OPTIONS["method"].help


def test_widgets():
    widgets = {widget.name: widget for widget in ToMeConfig.widgets()}
    assert len(widgets) == len(ToMeConfig.widgets()) == len(OPTIONS) + 1
    assert list(widgets)[:6] == ["ratio", "stride_x", "stride_y", "method", "seed", "partition"]
    assert widgets["stride_x"].option.label == "Stride x" and not widgets["stride_x"].option.parts
    for name in set(OPTIONS) - {"stride"}:
        assert widgets[name].option == OPTIONS[name] and widgets[name].unnamed == getattr(ToMeConfig(), name)
        assert widgets[name].default == ("auto" if name == "method" else widgets[name].unnamed)


def test_from_widgets_round_trip():
    assert ToMeConfig.from_widgets() == ToMeConfig()
    new = ToMeConfig.from_widgets(**{widget.name: widget.default for widget in ToMeConfig.widgets()})
    assert new == ToMeConfig(method="auto"), "a text or request of before names no method: it means sample"
    values = {
        "ratio": 0.4,
        "stride_x": 4,
        "stride_y": 2,
        "method": "merge_keys",
        "seed": MAX_SEED,
        "partition": "random",
        "levels": LEVELS[4],
        "start": 0.1,
        "end": 0.9,
        "ratio_end": 0.2,
        "cross_attention": True,
        "mlp": True,
        "proportional": False,
        "reduce": "pick",
        "min_tokens": 5,
        "share_match": True,
        "own_token": False,
        "whole": 0.3,
        "half": 0.4,
        "decisions": "merge_keys",  # a method alone: named levels have no other decisions
        "exact_every": 4,
    }
    made = ToMeConfig.from_widgets(**values)
    assert set(values) == {widget.name for widget in ToMeConfig.widgets()}
    assert made.stride == (4, 2)
    for name in set(OPTIONS) - {"stride"}:
        assert getattr(made, name) == values[name] != getattr(ToMeConfig(), name)


def test_from_widgets_refuses():
    for name in ("rato", "stride", "stride_z", "RATIO"):
        with pytest.raises(ValueError, match=f"'{name}'.*ratio.*stride_x"):
            ToMeConfig.from_widgets(**{name: 1})
    for values in ({"ratio": 3}, {"stride_x": 9}, {"stride_y": 0}, {"method": "x"}):
        with pytest.raises(ValueError, match=re.escape(next(iter(values)).split("_")[0])):
            ToMeConfig.from_widgets(**values)
