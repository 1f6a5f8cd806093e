"""The pictures of docs/how-it-works.md show the core's own plans."""

from __future__ import annotations

import numpy as np
import torch

from lab.fidelity import explain
from shared_tome import ToMeConfig
from shared_tome.merging.match import match_tokens


def noise_picture() -> np.ndarray:
    side = explain.SIDE * explain.PIXELS
    return np.random.default_rng(0).random((side, side, 3))


def test_what_is_kept_is_shown_as_it_is_and_the_rest_faded():
    picture, kept = noise_picture(), torch.tensor([0, explain.SIDE + 1])
    shown, p = explain.dimmed(picture, kept), explain.PIXELS
    for row, column in ((0, 0), (1, 1)):
        place = np.s_[row * p : (row + 1) * p, column * p : (column + 1) * p]
        assert np.array_equal(shown[place], picture[place])
    assert (shown[:p, p : 2 * p] >= 0.86).all()


def test_each_group_has_one_colour_its_mean():
    picture = noise_picture()
    plan = match_tokens(explain.features(picture), explain.GRID, ToMeConfig(method="merge", ratio=0.5), seed=0)
    shown = explain.means(picture, plan)
    p, side = explain.PIXELS, explain.SIDE
    tokens = picture.reshape(side, p, side, p, 3).mean((1, 3)).reshape(-1, 3)  # (N, 3)
    for number in range(plan.kept):
        mine = (plan.groups[0] == number).nonzero()[:, 0].numpy()
        for token in mine:
            row, column = divmod(int(token), side)
            np.testing.assert_allclose(shown[row * p, column * p], tokens[mine].mean(0), atol=1e-5)


def test_the_middle_of_a_token_lies_in_it():
    x, y = explain.middle(torch.tensor([explain.SIDE + 2]))
    assert 2 * explain.PIXELS <= x[0] < 3 * explain.PIXELS and explain.PIXELS <= y[0] < 2 * explain.PIXELS
