"""Keys weighed in parts combined by log-sum-exp: where it is done, and that it gives what channels of the heads
give."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from . import dit_host, host
from .dit_host import attention_alone, kept
from .test_dit_weights import AROUND, HEADS, D, alike, full, same, split

# What joins the parts, by whether queries keep their own tokens.
COMBINING = {False: "attend_in_parts", True: "attend_in_parts_with_lse"}


@pytest.fixture(autouse=True)
def comfy(comfy_nodes):
    """All of these need ComfyUI's attention."""


def joint_module():
    """shared_tome.attention.sequence, under the name that ComfyUI loaded it by."""
    return sys.modules[host.pack_module("dit_call").JointCall.__module__]


@pytest.fixture
def joined(monkeypatch):
    """How many keys the parts of each joined attention have, in the order of the calls."""
    module, seen = joint_module(), []
    kept_function = module.attend_in_parts

    def spy(q, parts, *args):
        seen.append([part[0].shape[2] for part in parts])
        return kept_function(q, parts, *args)

    monkeypatch.setattr(module, "attend_in_parts", spy)
    return seen


@pytest.fixture
def by_channels(monkeypatch):
    """Has made attentions from here on weigh their keys by channels."""
    return lambda: monkeypatch.setattr(host.pack_module("chosen").Chosen, "kernels", lambda *_, **__: ())


def tokens(length, *, batch=2, heads=HEADS, d=D, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, length, heads * d, generator=generator).to(dtype) for _ in range(3)]


# (grid, method, ratio): one weight, a few keys of another, two sizes in parts of their own.
SIZES = [
    ((8, 12), "sample", 0.75), ((8, 12), "downsample", 0.75), ((3, 4, 6), "sample", 0.5), ((7, 9), "sample", 0.75),
    ((1, 41), "sample", 0.9), ((32, 40), "sample", 0.7), ((7, 9, 15), "sample", 0.6),
]  # fmt: skip


@pytest.mark.parametrize(("grid", "method", "ratio"), SIZES)
@pytest.mark.parametrize(("head", "tail"), AROUND)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", ["flat", "split", "split out", "heads inside", "four"])
def test_joined_gives_what_channels_give(grid, method, ratio, head, tail, batch, layout, joined, by_channels):
    q, k, v = tokens(math.prod(grid) + head + tail, batch=batch)
    told = {}
    if layout == "four":
        v = v.unflatten(-1, (HEADS, -1))
    elif layout != "flat":
        q, k, v = (split(x) for x in (q, k, v))
        q, k, v = (q, k, v) if layout == "heads inside" else (x.contiguous() for x in (q, k, v))
        told = {"skip_reshape": True, "skip_output_reshape": layout == "split out"}
    before = [x.clone() for x in (q, k, v)]
    ours = attention_alone(grid, head, tail, method=method, ratio=ratio)(q, k, v, HEADS, **told)
    weighed = head + tail > 0 or math.prod(grid) % kept(math.prod(grid), ratio) > 0
    assert len(joined) == weighed
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
    by_channels()
    same(ours, attention_alone(grid, head, tail, method=method, ratio=ratio)(q, k, v, HEADS, **told))
    assert len(joined) == weighed


@pytest.mark.parametrize(
    ("grid", "ratio", "head", "parts"),
    [
        ((8, 12), 0.75, 5, [24, 5]),
        ((7, 9), 0.75, 5, [15, 5 + 3]),  # 63 = 15 * 4 + 1 * 3: one key of three among the text
        ((7, 9), 0.75, 0, [15, 3]),
        ((7, 9), 0.5, 0, [31, 1]),  # 63 = 31 * 2 + 1 * 1
        ((7, 9), 0.7, 0, [13, 6 * 4]),  # 63 = 13 * 3 + 6 * 4
        ((32, 40), 0.7, 0, [256, 128]),
        ((32, 40), 0.7, 5, [256, 128, 5]),  # 1280 = 256 * 3 + 128 * 4
    ],
)
def test_keys_of_one_weight_are_a_part(grid, ratio, head, parts, joined):
    q, k, v = tokens(math.prod(grid) + head)
    attention_alone(grid, head, 0, method="sample", ratio=ratio)(q, k, v, HEADS)
    assert joined == [parts]


def test_cudnn_gets_no_part_of_one_key(monkeypatch):
    monkeypatch.setattr(joint_module(), "choose_kernel", lambda *args: "cudnn")
    grid = (7, 9)
    k, v = (alike(grid, "sample", 0.5, 0, 0, seed=seed) for seed in (0, 1))
    run = attention_alone(grid, method="sample", ratio=0.5)
    same(run(k, k, v, HEADS), full(k, k, v))  # by channels: there is no cuDNN here


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("grid", "method", "ratio"), SIZES)
def test_joined_in_half_precision(grid, method, ratio, dtype, joined, by_channels):
    """No further from float64 than each part's own rounding."""
    head, tail = 5, 3
    q, k, v = tokens(math.prod(grid) + head + tail, dtype=dtype)
    ours = attention_alone(grid, head, tail, method=method, ratio=ratio)(q, k, v, HEADS)
    assert joined and ours.dtype == dtype
    by_channels()
    run = attention_alone(grid, head, tail, method=method, ratio=ratio)
    truth = run(*(x.double() for x in (q, k, v)), HEADS)
    channels = run(q, k, v, HEADS)
    error, other = (float((x.double() - truth).norm() / truth.norm()) for x in (ours, channels))
    assert error < 1.5 * len(joined[0]) * other
    same(ours, truth, tolerance=len(joined[0]) * torch.finfo(dtype).eps * float(truth.abs().max()))


def attend_once(*, override=None, grad=False, kv_heads=HEADS, **values):
    """One attention with text: joined, where nothing else is said."""
    grid, head = (8, 12), 5
    q, k, v = tokens(math.prod(grid) + head)
    k, v = (x[..., : kv_heads * D] for x in (k, v))
    told = {"enable_gqa": True} if kv_heads < HEADS else {}
    if values.pop("masked", False):
        told["mask"] = torch.zeros(1, 1, 1, q.shape[1])
    run = attention_alone(grid, head, 0, override, **{"method": "sample", "ratio": 0.75, **values})
    with torch.set_grad_enabled(grad):
        out = run(q.requires_grad_(grad), k, v, HEADS, **told)
    assert out.shape == q.shape


@pytest.mark.parametrize(
    "values",
    [
        {"override": lambda func, *args, **kwargs: func(*args, **kwargs)},
        {"masked": True},
        {"kv_heads": 2},
        {"grad": True},
        {"proportional": False},
        {"method": "merge"},
        {"method": "downsample", "ratio": 0.6},
    ],
    ids=lambda values: " ".join(values),
)
def test_what_is_not_joined(values, joined):
    attend_once(**values)
    assert joined == []
    attend_once()
    assert len(joined) == 1


@pytest.mark.parametrize("place", ["torch", "comfy.ops", "attention"])
def test_a_function_in_the_place_of_torchs_is_called(place, joined, monkeypatch):
    import comfy.ops
    from comfy.ldm.modules import attention

    called = []
    if place == "attention":

        def attention_pytorch(*args, **kwargs):  # another node's, of the same name
            called.append(args)
            return attention.attention_pytorch(*args, **kwargs)

        monkeypatch.setattr(attention, "optimized_attention", attention.wrap_attn(attention_pytorch))
    else:
        where = F if place == "torch" else comfy.ops
        real = where.scaled_dot_product_attention
        monkeypatch.setattr(
            where, "scaled_dot_product_attention", lambda *args, **kwargs: called.append(args) or real(*args, **kwargs)
        )
    attend_once()
    assert called and joined == []


@pytest.mark.parametrize("d", [D, 128])
def test_where_pytorchs_attention_steps_in_it_is_joined(joined, monkeypatch, d):
    """SageAttention takes heads of 128 channels at most: narrow ones reach it with their weights."""
    from comfy.ldm.modules import attention

    called = []

    def attention_sage(q, k, v, heads, **kwargs):
        called.append(q.shape[-1] // heads)
        return attention.attention_pytorch(q, k, v, heads, **kwargs)

    monkeypatch.setattr(attention, "optimized_attention", attention.wrap_attn(attention_sage))
    q, k, v = tokens(96 + 5, d=d)
    ours = attention_alone((8, 12), 5, 0, method="sample", ratio=0.75)(q, k, v, HEADS)
    assert (called, joined) == (([64], []) if d == D else ([], [[24, 5]]))
    monkeypatch.undo()
    same(ours, attention_alone((8, 12), 5, 0, method="sample", ratio=0.75)(q, k, v, HEADS))


# Not: like Wan, with the video alone; heads that share their keys, or a mask, go by channels alone.
NOT_COMBINED = ("camera", "vace", "ltxv", "omnigen", "boogu", "hidream_o1", "lens")


@pytest.mark.parametrize("name", [name for name in dit_host.SMALL if name not in NOT_COMBINED])
@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_whole_models_are_the_same_either_way(name, ratio, tome, joined, by_channels):
    model = tome(dit_host.small(name), ratio=ratio, own_token=False)
    ours = dit_host.call(model, name)
    which = dit_host.SMALL[name]
    weighed = which.others > 0 or which.image % kept(which.image, ratio) > 0
    some_alone = which.layers - (name in ("sd3", "pixeldit", "pid") and ratio == 0.75)  # one has the image alone
    assert len(joined) == (some_alone if weighed else 0)
    by_channels()
    same(ours / ours.abs().max(), dit_host.call(model, name) / ours.abs().max(), tolerance=1e-4)


def test_one_graph_under_compile(joined):
    """The joined kernels are in the graph, and another order of kernels is in another graph's key."""
    grid, head = (7, 9), 5
    q, k, v = tokens(math.prod(grid) + head)
    targets = []

    def backend(graph, example):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    eager = attention_alone(grid, head, 0, method="sample", ratio=0.75)(q, k, v, HEADS)
    run = attention_alone(grid, head, 0, method="sample", ratio=0.75)
    torch._dynamo.reset()
    with torch.no_grad():
        same(torch.compile(lambda q, k, v: run(q, k, v, HEADS), backend=backend)(q, k, v), eager)
    torch._dynamo.reset()
    assert sum("flash_attention_for_cpu" in target for target in targets) == 2


def test_the_key_names_the_kernels(monkeypatch):
    dit, table = host.pack_module("dit"), host.pack_module("dit_models")

    def key():
        made = dit.ModelCall(host.pack_module("dit_patch").ToMeConfig(min_tokens=0), (8, 12), torch.device("cpu"))
        return dit.DiTCall(made, table.DIT_MODELS[0], dit.Layout((8, 12), 7, 0), {}).key

    before = key()
    monkeypatch.setattr(host.pack_module("chosen").Chosen, "kernels", lambda *_, **__: ("cudnn",))
    assert key() != before


def test_comfyuis_own_order_of_kernels(monkeypatch):
    import comfy.ops
    from torch.nn.attention import SDPBackend

    order = host.pack_module("chosen").Chosen({}).kernels
    chosen = [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    monkeypatch.setattr(comfy.ops, "SDPA_BACKEND_PRIORITY", chosen, raising=False)
    assert order(torch.device("cuda")) == ("cudnn", "MATH", "flash")
    assert order(torch.device("cpu")) == ("torch",)
    monkeypatch.delattr(comfy.ops, "SDPA_BACKEND_PRIORITY")
    assert order(torch.device("cuda")) == ("torch",)  # what torch itself would take, in an order that is not ours


@pytest.mark.parametrize("own", [False, True])
def test_a_kernel_that_refuses_is_left_for_wider_heads(own, by_channels, monkeypatch, caplog):
    """Once a call of the model: no layer crashes, and the result is the one of the other way."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise RuntimeError("not on this device\nand more")

    monkeypatch.setattr(joint_module(), COMBINING[own], refuse)
    q, k, v = tokens(96 + 5)
    attend = attention_alone((8, 12), 5, 0, ratio=0.75, own_token=own)
    host.forget_log()
    with caplog.at_level("INFO"):
        ours = [attend(q, k, v, HEADS) for _ in range(2)]
    assert len(tried) == 1 and "not on this device" in caplog.text
    by_channels()
    attend = attention_alone((8, 12), 5, 0, ratio=0.75)
    for out in ours:
        same(out, attend(q, k, v, HEADS))


@pytest.mark.parametrize("own", [False, True])
def test_no_memory_is_not_taken_for_a_refusal(own, monkeypatch):
    def full_up(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(joint_module(), COMBINING[own], full_up)
    with pytest.raises(torch.cuda.OutOfMemoryError):  # ComfyUI frees memory and tries again
        attention_alone((8, 12), 5, 0, ratio=0.75, own_token=own)(*tokens(96 + 5), HEADS)
