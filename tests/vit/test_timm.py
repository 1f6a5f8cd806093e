"""vit.apply_patch on timm's vision transformers equals the paper's loops, trains, and leaves nothing behind."""

from __future__ import annotations

import copy
import threading

import numpy
import pytest
import torch

import shared_tome.vit as vit
from shared_tome import match_tokens
from shared_tome.vit import hooks as vit_hooks
from shared_tome.vit.options import spread_total

from . import reference

timm = pytest.importorskip("timm", reason="timm is not installed, see requirements/test.txt")

MODELS = {
    "class": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 0.5, "img_size": 70}),
    "mean": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False, "fc_norm": True}),
    "mean_with_class": ("vit_tiny_patch16_224", {"global_pool": "avg", "qk_norm": True}),
    "attention_pool": ("vit_base_patch16_siglip_224", {"num_classes": 0}),
}


def make(name="class", **more):
    architecture, options = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"depth": 5, "embed_dim": 32, "num_heads": 2, "img_size": 80, "num_classes": 5, **options, **more}
        model = timm.create_model(architecture, **options).eval()
        for parameter, weight in model.named_parameters():
            if parameter.endswith(("qkv.weight", "head.weight", "_embed", "cls_token", "reg_token")):
                weight.data *= 5  # attention and outputs that tell tokens apart
    return model


def images(model, batch=2, seed=1):
    size = model.patch_embed.img_size
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts(block):
    """For the reference: the model's own layers, put together as the paper has it."""
    attn = block.attn

    def qkv(x):
        q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1))[0].permute(1, 2, 0, 3)
        return attn.q_norm(q), attn.k_norm(k), v

    return qkv, lambda x: block.ls1(attn.proj(x)), lambda x: block.ls2(block.mlp(block.norm2(x)))


@torch.no_grad()
def expected(model, x, rs, proportional=True):
    """(outputs [B, classes], members by image, counts) of the loops."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    rows, members = [], []
    for row in tokens:
        merged, groups, counts = reference.run_blocks(
            model.blocks, row, rs, model.num_prefix_tokens, proportional, parts
        )
        rows.append(reference.spread(merged, groups))
        members.append(groups)
    return model.forward_head(model.norm(torch.stack(rows))), members, counts


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("rs", [[1] * 5, [4] * 5, [0, 6, 0, 3, 0], [40] * 5], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_papers_loops(name, rs):
    model = make(name).double()
    x = images(model)
    with torch.no_grad():
        before = model(x)
        for proportional in (True, False):
            outputs, members, counts = expected(model, x, rs, proportional)
            vit.apply_patch(model, rs, proportional=proportional, trace=True)
            found = model(x)
            trace = vit.trace(model)
            assert (found - outputs).abs().max() < 1e-5 * outputs.abs().max()
            assert trace.counts == tuple(counts)
            assert trace.sources.shape == (2, model.num_prefix_tokens + 25) and trace.sizes.shape[1] == counts[-1]
            for row, groups in enumerate(members):
                ours = [(trace.sources[row] == place).nonzero().flatten().tolist() for place in range(counts[-1])]
                assert ours == groups, "the sources are not the reference's"
                assert trace.sizes[row].tolist() == [len(group) for group in groups]
            vit.remove_patch(model)
        plain, _, _ = expected(model, x, [0] * 5)
        torch.testing.assert_close(plain, before)
        assert (outputs - before).abs().max() > 1e-3 * before.abs().max(), "merging must show"
        weighted, _, _ = expected(model, x, rs)
        assert (outputs - weighted).abs().max() > 1e-4, "the weights must matter"
        assert torch.equal(model(x), before)


@torch.no_grad()
def test_each_step_of_the_trace_is_what_a_shorter_model_ends_with():
    model = make("class")
    x, rs = images(model), [4, 0, 6, 3, 0]
    vit.apply_patch(model, rs, trace=True)
    model(x)
    trace = vit.trace(model)
    assert len(trace.steps) == 5 and torch.equal(trace.steps[-1], trace.sources)
    assert torch.equal(trace.steps[0], trace.steps[1]), "nothing merges in the second block"
    for depth in (1, 2, 3, 4):
        vit.apply_patch(model, rs[:depth] + [0] * (5 - depth), trace=True)
        model(x)
        assert torch.equal(vit.trace(model).sources, trace.steps[depth - 1])
        assert trace.steps[depth - 1].max() + 1 == trace.counts[depth - 1]
    vit.apply_patch(model, 0, trace=True)
    model(x)
    assert all(torch.equal(step, torch.arange(26).expand(2, -1)) for step in vit.trace(model).steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_merging_again_weighs_by_size_in_any_precision(dtype):
    """Sizes up to 200 and values near half precision's largest: means in float32, rounded once."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 12, 5, generator=generator) * 9000).to(dtype)
    sizes = torch.randint(1, 200, (2, 12), generator=generator).float()
    plan = match_tokens(torch.randn(2, 12, 4, generator=generator), (1, 12), vit_hooks._config(4, 12))
    merged, total = plan.merge_again(x, sizes)
    assert merged.dtype == dtype
    for row in range(2):
        for place in range(plan.kept):
            inside = plan.groups[row] == place
            weight = sizes[row, inside].double()
            mean = (x[row, inside].double() * weight[:, None]).sum(0) / weight.sum()
            assert total[row, place] == weight.sum()
            torch.testing.assert_close(merged[row, place].double(), mean.to(dtype).double(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_prefix_tokens_stay_alone_and_in_place(name):
    model = make(name)
    prefix = model.num_prefix_tokens
    vit.apply_patch(model, 9, trace=True)
    model(images(model))
    trace = vit.trace(model)
    for place in range(prefix):
        assert (trace.sources[:, place] == place).all() and (trace.sizes[:, place] == 1).all()
    assert (trace.sizes.sum(1) == prefix + 25).all()


def test_tokens_of_each_block():
    model, seen = make(), []
    x = images(model)
    for block in model.blocks:
        block.attn.register_forward_hook(lambda m, args, out: seen.append(("attn", args[0].shape[1], out.shape[1])))
        block.mlp.register_forward_hook(lambda m, args, out: seen.append(("mlp", args[0].shape[1], out.shape[1])))
    vit.apply_patch(model, 4)
    model(x)
    counts = [26, 22, 18, 14, 10, 6]
    assert seen == [
        (part, count, count)
        for i in range(5)
        for part, count in (("attn", counts[i]), ("mlp", counts[i + 1]))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ({"r": 2, "schedule": "falling"}, (22, 19, 17, 16, 16)),
        ({"ratio": 0.4}, (24, 22, 20, 18, 16)),
        ({"ratio": 0.6, "schedule": "falling"}, (20, 15, 12, 11, 11)),
        ({"r": [0, 0, 5, 0, 1]}, (26, 26, 21, 21, 20)),
        ({"r": 0}, (26,) * 5),
    ],
    ids=str,
)
def test_schedules(arguments, counts):
    model = make()
    vit.apply_patch(model, **arguments, trace=True)
    model(images(model))
    assert vit.trace(model).counts == counts


def test_a_falling_schedule_has_the_same_sum():
    for depth in (1, 2, 12, 24, 32):
        for r in (0, 1, 3, 8, 16):
            constant, falling = (spread_total(r * depth, depth, name) for name in ("constant", "falling"))
            assert constant == (r,) * depth and sum(falling) == r * depth and min(falling) >= 0
            if depth > 2 and r > 2:
                assert abs(falling[0] - 2 * r) <= 1 and falling[-1] == 0
                assert all(a >= b - 1 for a, b in zip(falling, falling[1:], strict=False))


@pytest.mark.parametrize("name", ["class", "mean"])
def test_restore(name):
    model = make(name)
    x = images(model)
    prefix = model.num_prefix_tokens
    shapes, outputs = {}, {}
    for restore in ("last", "all", "none"):
        vit.apply_patch(model, 4, restore=restore)
        seen = []
        handles = [
            block.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out.shape[1]))
            for block in model.blocks
        ]
        outputs[restore] = model(x)
        for handle in handles:
            handle.remove()
        shapes[restore] = seen
    merged, full = [prefix + 25 - 4 * i for i in range(1, 6)], prefix + 25
    assert shapes == {"last": merged[:-1] + [full], "all": [full] * 5, "none": merged}
    assert torch.equal(outputs["all"], outputs["last"])
    torch.testing.assert_close(outputs["none"], outputs["last"]) if name == "class" else None


@pytest.mark.skipif(
    not hasattr(timm.models.VisionTransformer, "forward_intermediates"), reason="this timm has no forward_intermediates"
)
def test_dense_features_keep_their_grid():
    model = make()
    x = images(model)
    vit.apply_patch(model, 4, restore="all")
    assert [tuple(f.shape) for f in model.forward_intermediates(x, intermediates_only=True)] == [(2, 32, 5, 5)] * 5
    assert model.forward_features(x).shape == (2, 26, 32)


def test_gradients_flow_and_training_goes_on():
    """Against finite differences, and a few steps lower the loss; dropped paths and layer scale included."""
    model = make("class", depth=3).double()
    vit.apply_patch(model, 5)
    weight = model.blocks[0].attn.qkv.weight
    x = images(model)

    def loss():
        return model(x).square().sum()

    loss().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    slope, step = float((weight.grad * direction).sum()), 1e-4
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight += sign * step * direction
            values.append(float(loss()))
            weight -= sign * step * direction
    # Merged means are sums in float32, so the difference quotient is good to about 1e-7 / 1e-4.
    assert abs((values[0] - values[1]) / (2 * step) - slope) < 2e-2 * abs(slope)

    model = make("registers", drop_path_rate=0.3, depth=4).train()
    vit.apply_patch(model, 4)
    x, labels = images(model, 8), torch.arange(8) % 5
    head = torch.nn.Linear(32, 5)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    torch.manual_seed(0)
    for _ in range(15):
        value = torch.nn.functional.cross_entropy(head(model.forward_features(x)[:, 0]), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_remove_and_twice():
    model = make()
    x, names = images(model), set(vars(model))
    with torch.no_grad():
        before = model(x)
        vit.apply_patch(model, 4)
        once, count = model(x), hooks(model)
        assert vit.apply_patch(model, 2) is model and not torch.equal(model(x), once)
        vit.apply_patch(model, 4)
        assert torch.equal(model(x), once) and hooks(model) == count
        twin = copy.deepcopy(model)
        assert vit.remove_patch(vit.remove_patch(model)) is model
        assert torch.equal(model(x), before) and hooks(model) == 0 and set(vars(model)) == names
        assert torch.equal(twin(x), once), "a copy keeps its own hooks"
        assert torch.equal(vit.remove_patch(twin)(x), before) and hooks(twin) == 0


@pytest.mark.parametrize("part", ["attn.proj", "norm2", "mlp.fc2", "norm1"])
def test_after_an_exception_all_is_well(part):
    model = make()
    x = images(model)
    vit.apply_patch(model, 4)
    with torch.no_grad():
        merged = model(x)
        for error in (ZeroDivisionError, KeyboardInterrupt):

            def fail(module, args, error=error):
                raise error

            handle = model.blocks[2].get_submodule(part).register_forward_pre_hook(fail)
            with pytest.raises(error):
                model(x)
            handle.remove()
            if error is not KeyboardInterrupt:  # for which torch runs no hook
                assert torch._C._len_torch_function_stack() == 0
                assert not model._shared_tome_vit._calls, "no tensor of the call is kept"
            # An attention of somebody else has nothing to do with what was interrupted.
            q = torch.randn(2, 2, 18, 8)
            mask = torch.ones(18, 18, dtype=torch.bool)
            torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
            assert torch.equal(model(x), merged) and torch._C._len_torch_function_stack() == 0


def test_threads_do_not_mix():
    """Two calls that are in the same blocks at the same time, each with its own tokens."""
    model = make()
    vit.apply_patch(model, 4)
    batches = [images(model, batch, seed=batch) for batch in (1, 3)]
    with torch.no_grad():
        wanted, found = [model(x) for x in batches], {}
    barrier = threading.Barrier(2, timeout=20)

    def meet(module, args):
        barrier.wait()

    for block in model.blocks[1:]:
        block.attn.register_forward_pre_hook(meet)

    def work(place):
        with torch.no_grad():
            found[place] = model(batches[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(torch.equal(found[place], wanted[place]) for place in found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "r or ratio"),
        ({"r": 1, "ratio": 0.5}, "r or ratio"),
        ({"ratio": 1.0}, "ratio must lie in 0 to 1"),
        ({"r": -1}, "from 0 on, or a list"),
        ({"r": 1.5}, "from 0 on, or a list of them, got 1.5"),
        ({"ratio": False}, "without 1, got False"),
        ({"r": 1, "proportional": "no"}, "proportional must be true or false, got 'no'"),
        ({"r": 1, "trace": 2}, "trace must be true or false, got 2"),
        ({"ratio": "0.5"}, "ratio must lie in 0 to 1, without 1, got '0.5'"),
        ({"r": [1, 2]}, "each of the 5 blocks, got 2"),
        ({"r": 1, "schedule": "rising"}, "constant, falling, got 'rising'"),
        ({"r": 1, "restore": "some"}, "last, all, none, got 'some'"),
    ],
)
def test_arguments_out_of_range(arguments, words):
    model = make()
    with pytest.raises(ValueError, match=words):
        vit.apply_patch(model, **arguments)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"r": numpy.int64(3)}, {"r": 3}),
        ({"r": list(numpy.array([1, 2, 3, 0, 1]))}, {"r": [1, 2, 3, 0, 1]}),
        ({"ratio": numpy.float32(0.5)}, {"ratio": 0.5}),
    ],
)
def test_numpys_numbers_are_numbers(given, plain):
    model = make()
    with torch.no_grad():
        outs = [vit.apply_patch(model, **arguments)(images(model)) for arguments in (given, plain)]
    assert torch.equal(*outs)


def test_checkpointing_that_is_switched_on_later_is_told():
    model = vit.apply_patch(make().train(), 3)
    model.set_grad_checkpointing(True)
    out = model(images(model))
    with pytest.raises(RuntimeError, match="does not work with gradient checkpointing"):
        out.sum().backward()


@pytest.mark.parametrize("arguments", [{"r": 3}, {"ratio": 0.5, "schedule": "falling"}])
def test_a_traced_model_merges_as_the_model_does(arguments):
    model = vit.apply_patch(make(), **arguments)
    with torch.no_grad():
        traced = torch.jit.trace(model, images(model), check_trace=False)
        others = images(model, seed=2)
        torch.testing.assert_close(traced(others), model(others), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not timm.list_models("naflexvit*"), reason="this timm has no NaFlexVit")
def test_naflex_with_keys_that_turn_is_refused():
    with pytest.raises(ValueError, match="does not know NaFlexVit"):  # of blocks that turn keys by their place
        name = "naflexvit_base_patch16_parfac_gap"
        vit.apply_patch(timm.create_model(name, depth=1, embed_dim=16, num_heads=2, rope_type="axial"), 1)


def test_what_is_not_served_is_named():
    with pytest.raises(ValueError, match="timm's VisionTransformer and NaFlexVit, transformers' vision towers of CLIP"):
        vit.apply_patch(torch.nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="does not know Eva"):  # its keys are turned by their place
        vit.apply_patch(timm.create_model("eva02_tiny_patch14_224", depth=1, img_size=28), 1)
    with pytest.raises(ValueError, match="does not know Beit"):  # its attention adds a bias for each pair of places
        vit.apply_patch(timm.create_model("beit_base_patch16_224", depth=1, img_size=32, embed_dim=12, num_heads=2), 1)
    with pytest.raises(ValueError, match="trace=True"):
        vit.trace(make())
    model = make()
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(ValueError, match="fused attention"):
        vit.apply_patch(model, 1)
    model = make()
    vit.apply_patch(model, 1)
    with pytest.raises(ValueError, match="masked attention"):
        model(images(model), attn_mask=torch.ones(26, 26, dtype=torch.bool))
