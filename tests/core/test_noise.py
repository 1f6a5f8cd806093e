"""Random numbers by hashing: fixed for ever, since a picture's seed depends on them."""

from __future__ import annotations

import pytest
import torch

from shared_tome import match_tokens
from shared_tome.core.noise import bits, fold_seed, key, mix

from .helpers import config, tokens

MASK = 2**32 - 1

# Fixed: another number here is another picture for everybody's seeds.
MIX = [0, 1753845952, 3507691905, 1734902346]
KEYS = [0, 3574078228, 1574832395]
BITS = [1074557550, 1515718762, 951096124, 1909599716]
SAMPLED = [9, 11, 18, 16, 32, 57, 50, 42, 44, 53, 63, 46, 22, 21, 5, 6]
CELLS = [0, 2, 5, 7, 17, 20, 22, 26, 33, 34, 37, 39, 55, 57, 59, 61]
ANYWHERE = [4, 11, 16, 18, 20, 25, 27, 28, 32, 37, 41, 44, 46, 51, 54, 58]


def lowbias32(x: int) -> int:
    """C. Wellons' 32-bit hash, in whole numbers."""
    x &= MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def test_known_answers():
    assert mix(torch.tensor([0, 1, 2, MASK])).tolist() == MIX
    assert int(key(torch.tensor(0))) == KEYS[0]
    assert int(key(torch.tensor(1234), 5, 3, 1)) == KEYS[1]
    assert int(key(torch.tensor(2**40 + 1234), 5, 3, 1)) == KEYS[2]
    assert bits(torch.tensor(1234), 4).tolist() == BITS


def test_known_choices():
    x = torch.zeros(1, 64, 1)
    choice = match_tokens(x, (8, 8), config(method="sample", ratio=0.75), seed=42, step=1, layer=2).index[0]
    assert choice.tolist() == SAMPLED
    dst = match_tokens(x, (8, 8), config(partition="random_2d", ratio=1.0), seed=42, step=1, layer=2).index[0]
    assert dst.tolist() == CELLS
    dst = match_tokens(x, (8, 8), config(partition="random", ratio=1.0), seed=42, step=1, layer=2).index[0]
    assert dst.tolist() == ANYWHERE


def test_mix_is_the_published_hash():
    numbers = torch.randint(0, 2**32, (2000,), generator=torch.Generator().manual_seed(0))
    assert mix(numbers).tolist() == [lowbias32(int(x)) for x in numbers]
    assert mix(torch.arange(100_000)).unique().numel() == 100_000


def test_bits_are_distinct_and_fill_32_bits():
    drawn = bits(key(torch.tensor(5), 1), 100_000)
    assert drawn.dtype == torch.int64 and int(drawn.min()) >= 0 and int(drawn.max()) <= MASK
    assert drawn.unique().numel() == 100_000  # so that no choice hangs on how a backend orders ties
    share = ((drawn[:, None] >> torch.arange(32)) & 1).double().mean(0)
    assert (share - 0.5).abs().max() < 0.01


def test_bits_of_several_keys():
    keys = key(torch.tensor([3, 4, 5]), 7)
    assert torch.equal(bits(keys, 9), torch.stack([bits(one, 9) for one in keys]))
    assert torch.equal(bits(keys, 9)[:, :5], bits(keys, 5))


def test_keys_of_near_words_differ():
    keys = [int(key(torch.tensor(seed), step, layer)) for seed in range(8) for step in range(32) for layer in range(32)]
    assert len(set(keys)) == len(keys)


def test_words_may_be_numbers_or_tensors():
    assert int(key(torch.tensor(9), 4, 2)) == int(key(torch.tensor(9), torch.tensor(4), torch.tensor(2)))
    both = key(torch.tensor([9, 10]), torch.tensor(4), 2)
    assert both.tolist() == [int(key(torch.tensor(seed), 4, 2)) for seed in (9, 10)]


def test_fold_seed():
    assert [fold_seed(seed) for seed in (0, 1, 1234, MASK)] == [0, 1, 1234, MASK]
    seeds = [low + (high << 32) for low in (0, 1, 2, MASK) for high in (0, 1, 2, 3, MASK)]
    assert len({fold_seed(seed) for seed in seeds}) == len(seeds)
    assert all(0 <= fold_seed(seed) <= MASK for seed in seeds)


@pytest.mark.parametrize("seed", [0, 1, 1234, MASK, 2**32, 2**40 + 1234, 2**63 - 1, 2**63, 2**64 - 1])
def test_number_and_tensor_seeds_agree(seed):
    """A tensor holds the same 64 bits, signed."""
    signed = seed - 2**64 if seed >= 2**63 else seed
    assert int(key(torch.tensor(signed), 1)) == int(key(torch.tensor(fold_seed(seed)), 1))
    x = tokens(2, (8, 8), 4)
    for ours in (config(method="sample"), config(partition="random_2d"), config(partition="random")):
        number = match_tokens(x, (8, 8), ours, seed=seed)
        for tensor in (torch.tensor(signed), torch.tensor([signed]), torch.tensor([signed, signed])):
            assert torch.equal(number.groups, match_tokens(x, (8, 8), ours, seed=tensor).groups)
            assert torch.equal(number.index, match_tokens(x, (8, 8), ours, seed=tensor).index)
        assert torch.equal(number.index, match_tokens(x, (8, 8), ours.replace(seed=seed)).index)


def test_both_halves_of_a_seed_count():
    x = tokens(1, (16, 16), 4)
    for ours in (config(method="sample"), config(partition="random_2d")):
        seeds = [low + (high << 32) for low in (0, 5) for high in range(3)]
        assert len({tuple(match_tokens(x, (16, 16), ours, seed=seed).index[0].tolist()) for seed in seeds}) == 6
