"""Options that the page greys change nothing with the method; those that it does not grey are looked at."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from . import dit_host, host
from .host import sample

sys.path.insert(0, str(host.REPO))
from shared_tome.methods import METHODS, idle_options

# Another value than the default, which shows where an option is looked at.
OTHER = {
    "stride_x": 4, "stride_y": 3, "partition": "fixed_2d", "cross_attention": True, "mlp": True, "proportional": False,
    "reduce": "pick", "share_match": True, "own_token": False, "whole": 0.5, "half": 0.25,
    "exact_every": 2,
}  # fmt: skip
REFUSED = ("cross_attention", "mlp")


@pytest.fixture(scope="module")
def picture(sd15, tome):
    """picture(method, **options) of a small U-Net."""
    return functools.cache(lambda method, **options: sample(tome(sd15, method=method, ratio=0.6, **options), steps=1))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "multires"])
def test_a_greyed_option_changes_nothing(picture, method):
    idle = idle_options(method)
    for name in idle:
        if name in REFUSED:
            with pytest.raises(ValueError, match=name):
                picture(method, **{name: OTHER[name]})
        else:
            assert torch.equal(picture(method, **{name: OTHER[name]}), picture(method)), name


@pytest.mark.parametrize("method", [method for method in METHODS if method != "multires"])
def test_what_is_not_greyed_changes_the_picture(picture, method):
    same = {"share_match"}  # on a picture whose halves match alike
    for name in set(OTHER) - set(idle_options(method)) - same:
        assert not torch.equal(picture(method, **{name: OTHER[name]}), picture(method)), name


def test_a_greyed_option_changes_nothing_at_three_resolutions(tome):
    model = dit_host.small("zimage")
    known = {"method": "multires", "ratio": 0.75, "min_tokens": 0, "levels": "0"}
    picture = functools.cache(lambda **options: dit_host.sample(tome(model, **known, **options), "zimage", steps=1))
    for name in set(idle_options("multires")) - set(REFUSED):
        assert torch.equal(picture(**{name: OTHER[name]}), picture()), name
    for name in ("whole", "half"):
        assert not torch.equal(picture(**{name: OTHER[name]}), picture()), name


def test_auto_greys_what_neither_of_its_methods_looks_at():
    assert set(idle_options("auto")) == set(idle_options("sample")) & set(idle_options("multires"))
    assert not {"own_token", "whole", "half", "proportional"} & set(idle_options("auto"))
