"""Partition "alternate" equals the vision transformer paper's bipartite soft matching, written out as a slow loop.

Bolya et al. (arXiv 2210.09461), section 3: tokens alternate between two sets; each of the first is tied to its most
similar in the second; the r best ties merge, as means weighted by size; class and distillation tokens never merge.
"""

from __future__ import annotations

import pytest
import torch

from shared_tome import match_tokens

from .helpers import config, tokens


def slow_matching(metric, goes, class_token=False, distill_token=False):
    """One image's groups of tokens, each with its destination first, in the order of the merged tokens.

    metric: [N, C]. In the order that the paper's authors use: with a class token those that stay keep their order,
    the class token first, the distillation token second; without one the most similar first; the destinations last.
    """
    unit = [row / row.norm() for row in metric]
    src, dst = range(0, len(unit), 2), range(1, len(unit), 2)
    ties = []
    for i in src:
        if class_token and i == 0:
            continue
        similar = [(float(unit[i] @ unit[j]), j) for j in dst if not (distill_token and j == 1)]
        score, j = max(similar)
        ties.append((score, i, j))
    ties.sort(reverse=True)
    merged, rest = ties[:goes], ties[goes:]
    stay = [i for _, i, _ in rest] + ([0] if class_token else [])
    if class_token:
        stay.sort()
    groups = {j: [j] for j in dst}
    for _, i, j in merged:
        groups[j].append(i)
    if distill_token:
        return [[stay[0]], groups.pop(1), *([i] for i in stay[1:]), *groups.values()]
    return [*([i] for i in stay), *groups.values()]


def slow_merge(x, sizes, groups):
    """x [N, C] and sizes [N] -> the weighted means [M, C] and their sizes [M]."""
    merged, summed = [], []
    for group in groups:
        total = sum(float(sizes[i]) for i in group)
        merged.append(sum(x[i].double() * float(sizes[i]) for i in group) / total)
        summed.append(total)
    return torch.stack(merged).float(), torch.tensor(summed)


def ratio_for(goes, count):
    return (goes + 0.5) / count


@pytest.mark.parametrize("protected", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("count", "goes"), [(9, 1), (16, 5), (17, 7), (50, 13), (51, 24), (197, 16), (198, 98)])
def test_repeated_merging(count, goes, protected):
    """Three layers, each merging what the last one left, with sizes carried along."""
    class_token, distill_token = protected
    x = tokens(2, (1, count), 12, seed=count)
    expected, expected_sizes = list(x), [torch.ones(count)] * 2
    sizes = torch.ones(2, count)
    for _ in range(3):
        count = x.shape[1]
        here = min(goes, (count - class_token - distill_token) // 2)
        if here == 0:
            break
        ours = config(ratio=ratio_for(here, count), partition="alternate")
        plan = match_tokens(x, (1, count), ours, class_token=class_token, distill_token=distill_token)
        assert plan.kept == count - here
        x, sizes = plan.merge_again(x, sizes)
        for row in range(2):
            groups = slow_matching(expected[row], here, class_token, distill_token)
            for place, group in enumerate(groups):
                assert int(plan.index[row, place]) == group[0]
                assert [i for i in range(count) if int(plan.groups[row, i]) == place] == sorted(group)
            expected[row], expected_sizes[row] = slow_merge(expected[row], expected_sizes[row], groups)
            torch.testing.assert_close(x[row], expected[row], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(sizes[row], expected_sizes[row])
            expected[row] = x[row]  # so that a rounding error does not become another match


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 49, 50, 197, 198])
def test_class_and_distillation_tokens_stay_alone_and_in_place(count, ratio):
    x = tokens(3, (1, count), 8, seed=count)
    x[0, :] = x[0, 0]  # all alike: nothing but the protection keeps the class token out
    for distill_token in (False, True):
        ours = config(ratio=ratio, partition="alternate")
        plan = match_tokens(x, (1, count), ours, class_token=True, distill_token=distill_token)
        merged = plan.merge(x)
        for place in range(1 + distill_token):
            assert (plan.groups[:, place] == place).all() and (plan.index[:, place] == place).all()
            assert (plan.sizes[:, place] == 1).all()
            assert torch.equal(merged[:, place], x[:, place])
        assert not plan.is_identity or int(count * ratio) == 0 or count < 3 + distill_token


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        ({"partition": "random_2d"}, {"class_token": True}),
        ({"partition": "fixed_2d"}, {"class_token": True, "distill_token": True}),
        ({"partition": "alternate", "method": "sample"}, {"class_token": True}),
        ({"partition": "alternate", "method": "downsample"}, {"class_token": True}),
        ({"partition": "alternate"}, {"distill_token": True}),
    ],
)
def test_protection_that_cannot_be_kept_is_refused(options, kwargs):
    with pytest.raises(ValueError, match="class"):
        match_tokens(tokens(1, (4, 4), 4), (4, 4), config(**options), **kwargs)
