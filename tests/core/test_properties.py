"""What holds for every method, partition, grid and ratio."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared_tome import METHODS, Plan, ToMeConfig, match_tokens

from .helpers import MATCHING, PARTITIONS, config, promised_count, tokens

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANDOM = [("sample", "random_2d"), ("merge", "random_2d"), ("merge", "random")]

sides = st.one_of(st.just(1), st.integers(1, 24))
# Pictures, and videos of a few frames.
grids = st.one_of(st.tuples(sides, sides), st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8)))
ratios = st.one_of(st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.floats(0.0, 1.0))
configs = st.builds(
    config,
    ratio=ratios,
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    method=st.sampled_from(tuple(METHODS)),
    partition=st.sampled_from(PARTITIONS),
    reduce=st.sampled_from(("mean", "pick")),
    seed=st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1)),
)
batches, channels, dtypes = st.integers(1, 4), st.integers(1, 40), st.sampled_from(DTYPES)


def takes_means(config: ToMeConfig) -> bool:
    return (config.kind.reduce or config.reduce) == "mean"


def there_and_back(plan: Plan, x: torch.Tensor) -> torch.Tensor:
    return plan.unmerge(plan.merge(x))


def same_plan(a: Plan, b: Plan) -> bool:
    return torch.equal(a.index, b.index) and torch.equal(a.groups, b.groups) and torch.equal(a.sizes, b.sizes)


@given(batches, grids, channels, configs, dtypes)
def test_ratio_0_gives_back_the_very_argument(batch, grid, width, config, dtype):
    x = tokens(batch, grid, width, dtype=dtype)
    plan = match_tokens(x, grid, config.replace(ratio=0.0))
    assert plan.is_identity and plan.ratio == 0.0 and plan.kept == x.shape[1]
    assert plan.merge(x) is x and plan.unmerge(x) is x and plan.key_bias() is None
    assert all(a is b for a, b in zip(plan.merge_again(x, x), (x, x), strict=True))
    check_layout(plan, batch, x.shape[1])


@given(grids, configs)
def test_a_batch_of_no_rows(grid, config):
    """As a detector's crops, where it has found nothing."""
    x = tokens(1, grid, 4)[:0]
    assert there_and_back(match_tokens(x, grid, config), x).shape == x.shape


@given(batches, grids, channels, configs, dtypes)
def test_groups_index_and_sizes_agree(batch, grid, width, config, dtype):
    plan = match_tokens(tokens(batch, grid, width, dtype=dtype), grid, config)
    check_layout(plan, batch, math.prod(grid))
    assert plan.kept == promised_count(config, grid)
    assert plan.is_identity == (plan.kept == plan.tokens)
    bias = plan.key_bias()
    expected = plan.sizes.log()
    if bias is None:
        assert (expected == expected[:, :1]).all()
    else:
        assert bias.dtype == torch.float32 and bias.shape[0] in (1, batch)
        assert torch.equal(bias.expand(batch, -1), expected)


def check_layout(plan, batch, count):
    index, groups, sizes = plan.index, plan.groups, plan.sizes
    assert index.shape == sizes.shape == (batch, plan.kept) and groups.shape == (batch, count)
    assert index.dtype == groups.dtype == torch.int64 and sizes.dtype == torch.float32
    assert plan.tokens == count and abs(plan.ratio - (1 - plan.kept / count)) < 1e-9
    for row in range(batch):
        assert len(set(index[row].tolist())) == plan.kept
        assert torch.equal(groups[row][index[row]], torch.arange(plan.kept))
        assert torch.equal(sizes[row], groups[row].bincount(minlength=plan.kept).float())
    assert (sizes.sum(1) == count).all() and (sizes >= 1).all()


@given(batches, grids, channels, configs, dtypes)
def test_unmerge_gives_each_token_its_groups_value(batch, grid, width, config, dtype):
    """merge and unmerge against the definition, from plan.groups and plan.index alone."""
    x = tokens(batch, grid, width, dtype=dtype)
    plan = match_tokens(x, grid, config)
    if takes_means(config):
        member = torch.nn.functional.one_hot(plan.groups, plan.kept).double()  # (B, N, M)
        expected = member.transpose(1, 2) @ x.double() / member.sum(1)[..., None]  # (B, M, C)
    else:
        expected = x.gather(1, plan.index[..., None].expand(-1, -1, width)).double()
    y = plan.merge(x)
    assert y.dtype == dtype and y.shape == (batch, plan.kept, width)
    tolerance = torch.finfo(dtype).eps * 4 if takes_means(config) else 0.0
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    out = plan.unmerge(y)
    assert out.dtype == dtype and out.shape == x.shape
    expected = y.gather(1, plan.groups[..., None].expand(-1, -1, width))
    if config.kind.fills:
        stays = torch.zeros(batch, x.shape[1]).scatter(1, plan.index, 1.0)[..., None] > 0
        expected = torch.where(stays, expected, torch.zeros_like(expected))
    assert torch.equal(out, expected)


@given(batches, grids, channels, configs, dtypes, st.floats(-100, 100))
def test_constants_stay_constant(batch, grid, width, config, dtype, value):
    x = torch.full((batch, math.prod(grid), width), value).to(dtype)
    plan = match_tokens(tokens(batch, grid, width), grid, config)
    out = there_and_back(plan, x)
    if config.kind.fills:
        stays = torch.zeros(out.shape[:2]).scatter(1, plan.index, 1.0) > 0
        assert torch.equal(out[stays], x[stays]) and (out[~stays] == 0).all()
        return
    tolerance = 0.0 if dtype != torch.float32 or not takes_means(config) else 1e-5
    torch.testing.assert_close(out, x, rtol=tolerance, atol=0.0)


@given(batches, grids, channels, configs, dtypes)
def test_tokens_that_stay_alone_are_exact(batch, grid, width, config, dtype):
    x = tokens(batch, grid, width, dtype=dtype)
    plan = match_tokens(x, grid, config)
    alone = plan.sizes.gather(1, plan.groups) == 1  # (B, N)
    assert torch.equal(there_and_back(plan, x)[alone], x[alone])


@given(batches, grids, channels, configs, dtypes)
def test_a_second_time_changes_nothing_more(batch, grid, width, config, dtype):
    x = tokens(batch, grid, width, dtype=dtype)
    plan = match_tokens(x, grid, config)
    once = there_and_back(plan, x)
    twice = there_and_back(plan, once)
    if takes_means(config):
        torch.testing.assert_close(twice, once, rtol=torch.finfo(dtype).eps * 8, atol=0.0)
    else:
        assert torch.equal(twice, once)


@given(batches, grids, configs)
def test_weighted_merging_is_the_same_in_one_go_or_two(batch, grid, config):
    """Means weighted by sizes: merging the merged gives the mean of the tokens that were."""
    x = tokens(batch, grid, 6)
    first = match_tokens(x, grid, config)
    second = match_tokens(first.merge(x), (1, first.kept), config.replace(seed=7))
    merged, sizes = second.merge_again(*first.merge_again(x, torch.ones(x.shape[:2])))
    groups = second.groups.gather(1, first.groups)  # (B, N)
    for row in range(batch):
        assert torch.equal(sizes[row], groups[row].bincount(minlength=second.kept).float())
    if takes_means(config):
        member = torch.nn.functional.one_hot(groups, second.kept).float()  # (B, N, M)
        expected = member.transpose(1, 2) @ x / sizes[..., None]
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


@given(batches, grids, configs, dtypes, st.booleans())
def test_zero_tokens_give_no_nan(batch, grid, config, dtype, all_of_them):
    x = tokens(batch, grid, 5, dtype=dtype)
    x[:, :: 1 if all_of_them else 2] = 0
    plan = match_tokens(x, grid, config)
    assert there_and_back(plan, x).isfinite().all()
    assert plan.kept == promised_count(config, grid)
    check_layout(plan, batch, x.shape[1])


def test_zero_tokens_are_similar_to_nothing():
    """They are the last to merge with tokens that are like another."""
    grid = (4, 4)
    x = torch.ones(1, 16, 3)
    src = [i for i in range(16) if i not in (0, 2, 8, 10)]
    x[:, src[::2]] = 0
    plan = match_tokens(x, grid, config(ratio=6 / 16, partition="fixed_2d"))
    gone = sorted(set(range(16)) - set(plan.index[0].tolist()))
    assert gone == src[1::2]


@given(batches, grids, configs, dtypes)
def test_one_seed_one_result(batch, grid, config, dtype):
    x = tokens(batch, grid, 8, dtype=dtype)
    first, again = (match_tokens(x, grid, config, step=3, layer=2) for _ in range(2))
    assert same_plan(first, again)
    assert torch.equal(there_and_back(first, x), there_and_back(again, x))
    named = match_tokens(x, grid, config.replace(seed=0), seed=config.seed, step=3, layer=2)
    assert same_plan(first, named)


@given(batches, grids, configs)
def test_the_global_generator_is_untouched(batch, grid, config):
    x = tokens(batch, grid, 4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    there_and_back(match_tokens(x, grid, config), x)
    there_and_back(match_tokens(x, grid, config, generator=torch.Generator().manual_seed(1)), x)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    other = match_tokens(x, grid, config)
    torch.manual_seed(5)
    assert same_plan(match_tokens(x, grid, config), other)


@given(batches, grids, configs, dtypes)
def test_the_default_dtype_changes_nothing(batch, grid, config, dtype):
    x = tokens(batch, grid, 4, dtype=dtype)
    plan = match_tokens(x, grid, config)
    bias, out = plan.key_bias(), there_and_back(plan, x)
    for default in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            other = match_tokens(x, grid, config)
            other_bias, other_out, sizes = other.key_bias(), there_and_back(other, x), other.sizes
        finally:
            torch.set_default_dtype(torch.float32)
        assert same_plan(plan, other) and torch.equal(out, other_out) and out.dtype == other_out.dtype
        assert sizes.dtype == torch.float32
        assert (bias is None) == (other_bias is None)
        if bias is not None:
            assert bias.dtype == other_bias.dtype == torch.float32 and torch.equal(bias, other_bias)


@given(batches, grids, configs)
def test_a_rows_result_does_not_hang_on_the_other_rows(batch, grid, config):
    x = tokens(batch, grid, 6).double()  # in double, so that no two scores are alike but for rounding
    plan = match_tokens(x, grid, config)
    for row in range(batch):
        alone = match_tokens(x[row : row + 1], grid, config)
        assert torch.equal(plan.index[row], alone.index[0]) and torch.equal(plan.groups[row], alone.groups[0])


@given(batches, st.integers(1, 2), grids, configs, st.integers(0, 2**63 - 1))
def test_a_seed_for_each_row(images, repeats, grid, config, seed):
    """Row i of [b] seeds has what its seed gives alone; a batch of several b rows repeats them."""
    seeds = [seed ^ (i * 0x1234567) for i in range(images)]
    x = tokens(images * repeats, grid, 6).double()
    plan = match_tokens(x, grid, config, seed=torch.tensor(seeds), step=1)
    y, out = plan.merge(x), there_and_back(plan, x)
    check_layout(plan, images * repeats, x.shape[1])
    for row in range(images * repeats):
        alone = match_tokens(x[row : row + 1], grid, config, seed=seeds[row % images], step=1)
        assert torch.equal(plan.index[row], alone.index[0]) and torch.equal(plan.groups[row], alone.groups[0])
        assert torch.equal(y[row : row + 1], alone.merge(x[row : row + 1]))
        assert torch.equal(out[row : row + 1], there_and_back(alone, x[row : row + 1]))


@pytest.mark.parametrize(("method", "partition"), RANDOM)
def test_other_seeds_steps_layers_differ(method, partition):
    grid, x = (16, 16), tokens(2, (16, 16), 4)
    ours = config(method=method, partition=partition)
    calls = [
        {"seed": seed, "step": step, "layer": layer}
        for seed in (0, 1, 2, 2**32 + 1, 2**63 + 1)
        for step, layer in ((0, 0), (1, 0), (0, 1) if method == "merge" else (1, 2))
    ]
    # sample walks: after as many layers or steps as a run has tokens (2 here) it sees the same again.
    if method == "sample":
        calls = [call for call in calls if call["layer"] == 0]
    chosen = [match_tokens(x, grid, ours, **call).index.sort(dim=1).values for call in calls]
    for i, one in enumerate(chosen):
        for other in chosen[:i]:
            assert not torch.equal(one, other)


FIXED = [("merge", "fixed_2d"), ("merge", "alternate"), ("downsample", "random")]


@pytest.mark.parametrize(("method", "partition"), FIXED)
def test_nothing_random_where_nothing_is_drawn(method, partition):
    x = tokens(2, (16, 16), 4)
    plans = [
        match_tokens(x, (16, 16), config(method=method, partition=partition), seed=seed, step=step, layer=step)
        for seed in (0, 1)
        for step in (0, 1)
    ]
    assert all(same_plan(plans[0], plan) for plan in plans)


@pytest.mark.parametrize(("method", "partition"), RANDOM)
def test_a_generator_is_reproducible(method, partition):
    x = tokens(2, (12, 12), 4)
    ours = config(method=method, partition=partition)

    def draw(seed, count=2):
        generator = torch.Generator().manual_seed(seed)
        return [match_tokens(x, (12, 12), ours, generator).index for _ in range(count)]

    assert torch.equal(torch.stack(draw(3)), torch.stack(draw(3)))
    assert not torch.equal(draw(3)[0], draw(4)[0])
    assert not torch.equal(*draw(3))  # it moves on
    if method == "sample":
        assert torch.equal(draw(3)[0][0], draw(3)[0][1])  # one choice for both rows


@pytest.mark.parametrize("partition", ["random_2d", "fixed_2d", "random"])
@pytest.mark.parametrize("method", MATCHING)
def test_one_choice_of_destinations_for_all_rows(method, partition):
    """At the cap what stays is the destinations: the same for prompted and unprompted rows."""
    plan = match_tokens(tokens(4, (12, 12), 4), (12, 12), config(method=method, partition=partition, ratio=1.0), seed=9)
    assert plan.ratio == 0.75
    for row in range(1, 4):
        assert torch.equal(plan.index[row], plan.index[0])
        assert not torch.equal(plan.groups[row], plan.groups[0])


@pytest.mark.parametrize("method", MATCHING)
@pytest.mark.parametrize("images", [1, 2, 3])
def test_share_match(method, images):
    """Both halves of a batch take the match of the first; an odd batch is matched as it is."""
    x = tokens(2 * images, (9, 11), 6).double()
    seeds = torch.arange(images) + 5
    for seed in (3, seeds, seeds.repeat(2)):
        shared = match_tokens(x, (9, 11), config(method=method, share_match=True), seed=seed)
        half = match_tokens(x[:images], (9, 11), config(method=method), seed=seed if isinstance(seed, int) else seeds)
        assert torch.equal(shared.index, half.index.repeat(2, 1))
        assert torch.equal(shared.groups, half.groups.repeat(2, 1))
        assert torch.equal(shared.sizes, half.sizes.repeat(2, 1))
        assert torch.equal(shared.merge(x)[images:], half.merge(x[images:]))
        assert torch.equal(there_and_back(shared, x)[images:], there_and_back(half, x[images:]))
        assert shared.key_bias().shape == (2 * images if images > 1 else 1, shared.kept)
    odd = tokens(3, (9, 11), 6)
    assert same_plan(
        match_tokens(odd, (9, 11), config(method=method, share_match=True)),
        match_tokens(odd, (9, 11), config(method=method)),
    )


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (1, 3), (2, 2)])
def test_the_smallest_grids(grid, method, partition):
    for ratio in (0.5, 1.0):
        for stride in ((1, 1), (2, 2), (4, 1)):
            ours = config(method=method, partition=partition, ratio=ratio, stride=stride)
            x = tokens(3, grid, 2)
            plan = match_tokens(x, grid, ours)
            check_layout(plan, 3, x.shape[1])
            assert plan.kept == promised_count(ours, grid)
            assert there_and_back(plan, x).shape == x.shape


def test_a_wrong_grid_is_refused():
    with pytest.raises(ValueError, match="4x5 has 20 tokens, the metric has 16"):
        match_tokens(tokens(1, (4, 4), 3), (4, 5), config())


def test_rows_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="2 rows does not fit a batch of 3"):
        match_tokens(tokens(3, (4, 4), 3), (4, 4), config(), seed=torch.tensor([1, 2]))


def test_downsample_is_the_top_left_token_of_each_cell():
    plan = match_tokens(tokens(1, (5, 7), 3), (5, 7), config(method="downsample", stride=(3, 2), ratio=1.0))
    assert plan.index[0].tolist() == [0, 3, 14, 17]
    assert plan.groups[0].reshape(5, 7).tolist() == [[0] * 3 + [1] * 4] * 2 + [[2] * 3 + [3] * 4] * 3


@pytest.mark.parametrize("method", ["merge", "downsample"])
def test_cells_do_not_reach_into_another_frame(method):
    ours = config(method=method, ratio=1.0)
    plan = match_tokens(tokens(2, (3, 5, 7), 4), (3, 5, 7), ours)
    place = plan.index[0].sort().values
    assert (place // 35).bincount().tolist() == [6, 6, 6]
    if method == "downsample":
        assert (place % 35).tolist() == [0, 2, 4, 14, 16, 18] * 3
        assert torch.equal(plan.groups[0] // 6, torch.arange(105) // 35)  # its own frame's


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("stride", [(1, 1), (1, 2), (2, 2), (2, 1)])
@pytest.mark.parametrize("grid", [(1, 8), (8, 1), (3, 3), (1, 1), (6, 6)])
def test_downsample_goes_by_cells_whatever_the_partition(grid, stride, partition):
    x = tokens(2, grid, 3)
    ours = config(method="downsample", stride=stride, ratio=1.0)
    assert same_plan(match_tokens(x, grid, ours), match_tokens(x, grid, ours.replace(partition=partition)))
