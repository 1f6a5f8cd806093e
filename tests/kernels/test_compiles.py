"""The kernels compile for a GPU, on a machine without one: the interpreter checks no types.

Each launcher is called as usual; what it would launch is caught and compiled for sm_90 with its own arguments.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def type_of(value):
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


class Compiled(list):
    """Names of the kernels that were launched; each was compiled, for a GPU of this capability.

    shared: bytes of shared memory that each takes.
    """

    capability = 90

    def __init__(self):
        super().__init__()
        self.shared = []


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = Compiled()

    def run(self, *given, grid, warmup, num_warps=4, num_stages=3, maxnreg=None, **named):
        values = dict(zip(self.arg_names, given, strict=False)) | named
        signature, constants, attributes = {}, {}, {}
        for at, parameter in enumerate(self.params):
            value = values[parameter.name]
            fixed = not parameter.do_not_specialize and isinstance(value, int) and not isinstance(value, bool)
            if parameter.is_constexpr or value is None or (fixed and value == 1):
                signature[parameter.name], constants[(at,)] = "constexpr", value
                continue
            signature[parameter.name] = type_of(value)
            if isinstance(value, torch.Tensor) or (fixed and value % 16 == 0):
                attributes[(at,)] = [["tt.divisibility", 16]]
        source = ASTSource(self, signature=signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
        made = triton.compile(source, target=GPUTarget("cuda", names.capability, 32), options=options)
        names.append(self.__name__)
        names.shared.append(made.metadata.shared)

    monkeypatch.setattr(JITFunction, "run", run)
    return names


def lists(src_count, dst_count):
    order = torch.randperm(src_count + dst_count)[None]
    return order[:, :src_count], order[:, src_count:]


# Tiles of src and dst alike, of src larger, of dst larger; counts of 64x64, 33x41 and 32x32 tokens.
@pytest.mark.parametrize(
    ("counts", "first", "dtype"),
    [
        ((3072, 1024), 0, torch.float16),
        ((996, 357), 0, torch.float16),
        ((768, 256), 1, torch.bfloat16),
        ((30, 1000), 1, torch.bfloat16),
    ],
)
def test_match(compiled, counts, first, dtype):
    from shared_tome.kernels.impl.match import launch_match

    metric = torch.empty(2, sum(counts), 64, dtype=dtype)
    launch_match(metric, *lists(*counts), counts[0] // 2, first=first)
    assert {"_unit_kernel", "_nearest_kernel", "_match_kernel"} == set(compiled)


@pytest.mark.parametrize(("dtype", "d"), [(torch.float16, 40), (torch.bfloat16, 64), (torch.float32, 160)])
def test_own(compiled, dtype, d):
    """Alone, and in a row with text before it, with one choice of tokens and with several."""
    from shared_tome.kernels.impl.self_token import launch_self_token, launch_take_by_head

    q, k, v, out = (torch.empty(2, 77 + 35, 3, d, dtype=dtype).transpose(1, 2)[:, :, 77:] for _ in range(4))
    lse = torch.empty(2, 3, 35)
    for rows in (1, 2):
        head_draws, runs = torch.zeros(4, rows, 9, dtype=torch.int64), torch.zeros(35, dtype=torch.int64)
        assert launch_self_token(q, k, v, out, lse, head_draws, runs, d**-0.5).shape == (2, 3, 35, d)
        assert [x.shape for x in launch_take_by_head(k, v, head_draws)] == [(2, 3, 9, d)] * 2
    assert compiled == ["_self_token_kernel", "_take_by_head_kernel"] * 2


# Heads of either size with their keys gathered before: test_attention_fits_into_shared_memory.
@pytest.mark.parametrize(
    ("dtype", "d", "text", "listed"), [(torch.float16, 64, 77, False), (torch.bfloat16, 128, 0, True)]
)
def test_attend_drawn(compiled, dtype, d, text, listed):
    from shared_tome.kernels.impl.attend_drawn import launch_attend_drawn

    q, k, v = (torch.empty(2, text + 36, 3, d, dtype=dtype).transpose(1, 2) for _ in range(3))
    head_draws, runs = torch.zeros(4, 2, 9, dtype=torch.int64), torch.zeros(36, dtype=torch.int64)
    drawn = (None if listed else torch.empty(2, 3, 9, d, dtype=dtype),) * 2
    assert launch_attend_drawn(q, k, v, *drawn, head_draws, runs, text, d**-0.5, 1.4).shape == q.shape
    assert compiled == ["_attend_drawn_kernel"]


@pytest.mark.parametrize(("dtype", "d"), [(torch.float16, 64), (torch.bfloat16, 128)])
@pytest.mark.parametrize(("queries", "keys"), [(300, 205), (15000, 205), (30000, 256)])
def test_attend(compiled, dtype, d, queries, keys):
    from shared_tome.kernels.impl.attend import launch_attend

    q, k, v = (torch.empty(2, n, 3, d, dtype=dtype).transpose(1, 2) for n in (queries, keys, keys))
    assert launch_attend(q, k, v, torch.zeros(1, keys), d**-0.5).shape == q.shape
    assert compiled == ["_attend_kernel"]


# An A100's, and those of RTX cards.
@pytest.mark.parametrize(("capability", "room"), [(80, 163 * 1024), (89, 99 * 1024)])
def test_attention_fits_into_shared_memory(compiled, monkeypatch, capability, room):
    """Where it does not a kernel fails for good, at heads of either size."""
    from shared_tome.kernels.impl import attend, attend_drawn

    monkeypatch.setattr(attend, "shared_memory", lambda device: room)
    compiled.capability = capability
    head_draws, runs = torch.zeros(4, 1, 9, dtype=torch.int64), torch.zeros(30000, dtype=torch.int64)
    for dtype, d, tokens in ((torch.float16, 64, 15000), (torch.bfloat16, 128, 30000)):
        q, k, v = (torch.empty(2, tokens, 3, d, dtype=dtype).transpose(1, 2) for _ in range(3))
        drawn = (torch.empty(2, 3, 9, d, dtype=dtype),) * 2
        attend.launch_attend(q, k, v, torch.zeros(1, tokens), d**-0.5)
        attend_drawn.launch_attend_drawn(q, k, v, *drawn, head_draws, runs[:tokens], 0, d**-0.5, 1.4)
    assert len(compiled) == 4 and 0 < max(compiled.shared) <= room
    # The counterpart: larger cards take more for heads of 128, in stages that the smaller ones go without.
    assert (max(compiled.shared[2:]) > 90 * 1024) == (room > 99 * 1024)


# Hopper; an A100's, those of RTX cards (40 and 50; the 30s have the room of the 40s). Small heads where there is the
# most room and the least.
@pytest.mark.parametrize(
    ("capability", "room", "sizes"),
    [
        (90, 227 * 1024, (64, 128, 256)),
        (80, 163 * 1024, (128, 256)),
        (89, 99 * 1024, (64, 128, 256)),
        (120, 99 * 1024, (128, 256)),
    ],
)
def test_multires(compiled, monkeypatch, capability, room, sizes):
    """Heads of every size fit into the shared memory of every card; the launches that choose too."""
    from shared_tome.core.multires import cut_tiles, draw_keys, tile_counts
    from shared_tome.kernels.impl import multires, multires_choose

    monkeypatch.setattr(multires_choose, "shared_memory", lambda device: room)
    compiled.capability = capability
    tiles = cut_tiles((48, 48), torch.device("cpu"), 77, 77 + 48 * 48)
    counts, drawn = tile_counts(tiles, 0.1, 0.4), draw_keys(tiles, torch.tensor(3), 0)
    for d in sizes:
        q, k, v = (torch.empty(1, len(tiles.rows), 3, d, dtype=torch.float16).transpose(1, 2) for _ in range(3))
        if d == 128:
            multires.launch_multires(q, k, v, tiles, drawn, counts, 1, d**-0.5)
        else:
            lists = torch.empty(1, 3, tiles.query_tiles, tiles.count, dtype=torch.int16)
            multires.launch_attend(q, k, v, tiles, drawn, lists, counts, 1, d**-0.5)
    assert sorted(set(compiled)) == ["_attend_kernel", "_choose_kernel", "_pool_kernel"]
    assert len(compiled) == 2 + len(sizes) and 0 < max(compiled.shared) <= room


@pytest.mark.parametrize(("capability", "room"), [(90, 227), (80, 163), (86, 99)])
def test_multires_under_a_mask(compiled, monkeypatch, capability, room):
    """Of bytes and of numbers, one a query, at heads of the two greatest sizes; once also alike for all queries."""
    from shared_tome.core.multires import cut_tiles, draw_keys, tile_counts
    from shared_tome.kernels.impl import multires, multires_choose

    monkeypatch.setattr(multires_choose, "shared_memory", lambda device: room * 1024)
    compiled.capability = capability
    tiles = cut_tiles((24, 24), torch.device("cpu"), 77, 77 + 24 * 24)
    counts, drawn = tile_counts(tiles, 0.1, 0.4), draw_keys(tiles, torch.tensor(3), 0)
    lists = torch.empty(2, 3, tiles.query_tiles, tiles.count, dtype=torch.int16)
    length = len(tiles.rows)
    of_keys, of_queries = torch.empty(2, 1, 1, length, dtype=torch.bfloat16), torch.empty(1, 1, length, length)
    masks = [(128, of_queries), (256, of_queries.bool())]  # these need the most room
    masks += [(128, of_keys), (256, of_keys.bool())] if capability == 90 else []
    for d, mask in masks:
        q, k, v = (torch.empty(2, length, 3, d, dtype=torch.float16).transpose(1, 2) for _ in range(3))
        multires.launch_attend(q, k, v, tiles, drawn, lists, counts, 1, d**-0.5, mask=mask)
    assert compiled == ["_attend_kernel"] * len(masks) and 0 < max(compiled.shared) <= room * 1024


def test_the_rest(compiled):
    from shared_tome.kernels.impl.draw import launch_draw
    from shared_tome.kernels.impl.gather import launch_gather
    from shared_tome.kernels.impl.mean import launch_links, launch_mean
    from shared_tome.kernels.impl.select import launch_select
    from shared_tome.kernels.impl.split import launch_split
    from shared_tome.kernels.impl.widen import launch_widen

    seed, step = torch.tensor([7]), torch.tensor(2)
    launch_draw(torch.randperm(63), seed, step, 0, 16, 0, 16)
    for random in (True, False):
        launch_split(seed, None, 3, 0, 1, 7, 9, 2, 2, random, 16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x, index = torch.empty(2, 63, 40, dtype=dtype), torch.randperm(63)[None, :20]
        launch_gather(x, index)
        groups = torch.zeros(2, 63, dtype=torch.int64)
        launch_mean(x, index.expand(2, -1), groups, *launch_links(index.expand(2, -1), groups, 20))
        src, dst = lists(47, 16)
        launch_select(torch.empty(2, 47, dtype=dtype), torch.zeros(2, 47, dtype=torch.int64), src, dst, 20)
        heads = torch.empty(2, 3, 63, 40, dtype=dtype)
        launch_widen(heads, heads, heads, torch.empty(1, 1, 63))
    assert len(set(compiled)) == 7
