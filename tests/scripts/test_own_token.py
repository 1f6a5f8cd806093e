"""The option own_token through diffusers and ldm: each query attends to itself beside the drawn tokens."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from support.self_token_weights import attended
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import shared_tome
from shared_tome import ModelCall, ToMeConfig
from shared_tome.attention.sdpa import AroundSdpa, as_autocast
from shared_tome.scripts.hooks import served_blocks

from . import dits, models

NOT_KEPT = "own token has no effect"


def config(**options):
    return ToMeConfig(**{"ratio": 0.75, "min_tokens": 0, "own_token": True, **options})


def by_head(x, project, heads):
    """x [B, N, C] -> [B, H, N, d] in float64."""
    return (x.double() @ project.weight.double().T).unflatten(-1, (heads, -1)).transpose(1, 2)


def expected_of(attn1, x, grid, config):
    """What attn1 is to give for x."""
    plan = ModelCall(config, grid, x.device).plan(x, grid)
    q, k, v = (by_head(x, project, attn1.heads) for project in (attn1.to_q, attn1.to_k, attn1.to_v))
    out = attended(q, k, v, plan).transpose(1, 2).flatten(2)
    return out @ attn1.to_out[0].weight.double().T + attn1.to_out[0].bias.double()


def watch(attn1, seen):
    """Have a layer write down its input, how many keys it projects, and its output."""
    attn1.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].clone()))
    attn1.to_k.register_forward_hook(lambda m, args, out: seen.update(keys=out.shape[1]))
    attn1.register_forward_hook(lambda m, args, out: seen.update(out=out.clone()))


def no_mode_is_on():
    return not _get_current_function_mode_stack()


@pytest.mark.parametrize("name", models.UNETS)
@pytest.mark.parametrize(("ratio", "size"), [(0.75, (16, 20)), (0.6, (15, 17)), (0.9375, (17, 15))])
def test_against_float64(name, ratio, size):
    unet, seen, ours = models.UNETS[name](), {}, config(ratio=ratio)
    attn1 = next(served_blocks(unet)).attn1
    shared_tome.apply_patch(unet, config=ours)
    watch(attn1, seen)
    models.run(unet, *size)
    grid = size if name == "sd15" else tuple((n + 1) // 2 for n in size)
    assert seen["x"].shape[:2] == (2, grid[0] * grid[1]) and seen["keys"] == grid[0] * grid[1]
    expected = expected_of(attn1, seen["x"], grid, ours)
    drawn = ModelCall(ours, grid, seen["x"].device).attention(seen["x"], seen["x"], seen["x"], grid)
    assert (seen["out"].double() - expected).abs().max() < 2e-6
    assert drawn.k.shape[1] < seen["keys"]


def test_off_asks_nothing_and_hooks_nothing_more(monkeypatch):
    """Off, the option is not there at all: no trial, no mode. On, it has no hook of its own either."""
    from shared_tome.attention import sdpa
    from shared_tome.hooks import trials

    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config())
    hooks = models.count_hooks(unet)
    monkeypatch.setattr(trials, "meets_at_sdpa", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(sdpa.AroundSdpa, "__enter__", lambda *_: 1 / 0)
    for options in ({"method": "merge"}, {"method": "downsample"}, {"proportional": False}):
        made = []
        for own in (True, False):
            shared_tome.apply_patch(unet, config=config(**options, own_token=own))
            assert models.count_hooks(unet) == hooks
            made.append(models.run(unet))
        assert torch.equal(*made)
    shared_tome.apply_patch(unet, config=config(own_token=False))
    assert models.count_hooks(unet) == hooks
    models.run(unet)
    shared_tome.apply_patch(unet, config=config())
    with pytest.raises(ZeroDivisionError):  # on, it does ask
        models.run(unet)


def test_under_multires_the_line_speaks_of_multires(caplog):
    from diffusers.models import attention_processor

    unet = models.sd15()
    unet.set_attn_processor(attention_processor.AttnProcessor())
    shared_tome.apply_patch(unet, config=config(method="multires"))
    made = models.run(unet)
    assert sum("multires needs PyTorch's attention" in record.getMessage() for record in caplog.records) == 1
    assert NOT_KEPT not in caplog.text
    shared_tome.apply_patch(unet, config=config(own_token=False))
    assert torch.equal(models.run(unet), made), "sample takes its place"


@pytest.mark.parametrize("processor", ["AttnProcessor", "SlicedAttnProcessor"])
@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_other_processors_get_the_drawn_tokens(processor, ratio, caplog):
    from diffusers.models import attention_processor

    unet = models.sd15()
    make = getattr(attention_processor, processor)
    unet.set_attn_processor(make(2) if processor == "SlicedAttnProcessor" else make())
    shared_tome.apply_patch(unet, config=config(ratio=ratio))
    made = models.run(unet)
    assert sum(NOT_KEPT in record.getMessage() for record in caplog.records) == 1
    shared_tome.apply_patch(unet, config=config(ratio=ratio, own_token=False))
    assert torch.equal(models.run(unet), made)


class Twice:
    """A processor that attends in two halves of the queries."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        out = torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.chunk(2, dim=2)], dim=2)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class Half(Twice):
    """One that leaves a part of the batch out (perturbed attention)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        half = q.shape[0] // 2
        out = F.scaled_dot_product_attention(q[:half], k[:half], v[:half])
        out = torch.cat((out, v[half:, :, :1].expand(-1, -1, q.shape[2], -1)))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class Again(Twice):
    """One that attends to all of them twice (two adapters)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        out = F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v.flip(-1))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("processor", [Twice, Half, Again])
def test_what_attends_otherwise_gets_the_drawn_tokens(processor, caplog):
    unet = models.sd15()
    unet.set_attn_processor(processor())
    shared_tome.apply_patch(unet, config=config())
    made = models.run(unet)
    assert NOT_KEPT in caplog.text
    shared_tome.apply_patch(unet, config=config(own_token=False))
    assert torch.equal(models.run(unet), made)


def test_another_function_in_torchs_place(monkeypatch, caplog):
    """SageAttention's way in."""
    inner = F.scaled_dot_product_attention
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config(own_token=False))
    drawn = models.run(unet)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: inner(*args, **kwargs))
    shared_tome.apply_patch(unet, config=config())
    assert torch.equal(models.run(unet), drawn) and NOT_KEPT in caplog.text


def test_an_attention_that_becomes_another_is_left_alone(caplog):
    """Nobody may change a processor within a step, but nothing wrong may come of it either."""
    unet = models.sd15()
    before = models.run(unet)
    shared_tome.apply_patch(unet, config=config())
    for block in served_blocks(unet):
        processor = copy.copy(block.attn1.processor)
        trial = []

        def fickle(attn, x, *args, inner=processor, trial=trial, **kwargs):
            if x.shape[1] < 10 or args or kwargs.get("encoder_hidden_states") is not None:
                return inner(attn, x, *args, **kwargs)
            return Twice()(attn, x)

        block.attn1.processor = fickle
    torch.testing.assert_close(models.run(unet), before, rtol=1e-4, atol=1e-5)
    said = [record.message for record in caplog.records if record.name == "ToMe"]
    assert said == ["[ToMe] ToMe skipped this attention: it behaved differently from its trial run."]


def test_no_kernel_that_tells_its_sums(monkeypatch, caplog):
    from shared_tome.hooks import heads

    monkeypatch.setattr(heads, "choose_kernel", lambda *_: None)
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config())
    made = models.run(unet)
    assert "gives no log-sum-exp" in caplog.text
    shared_tome.apply_patch(unet, config=config(own_token=False))
    assert torch.equal(models.run(unet), made)


class Watched(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_another_mode_gets_calls_with_the_drawn_tokens(ratio, caplog):
    """Where torch's kernels may not be called directly: the same keys, weighed by channels."""
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config(ratio=ratio, own_token=False))
    drawn = models.run(unet)
    shared_tome.apply_patch(unet, config=config(ratio=ratio))
    kept = models.run(unet)
    assert NOT_KEPT not in caplog.text
    with Watched():
        made = models.run(unet)
    torch.testing.assert_close(made, drawn, rtol=1e-4, atol=1e-5)
    assert caplog.text.count("own token has no effect beside dropout, or another package's mode") == 1
    assert not torch.allclose(made, kept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_nothing_stays_behind(error):
    unet = models.sd15()
    before = models.run(unet)
    shared_tome.apply_patch(unet, config=config())
    kept = models.run(unet)
    assert no_mode_is_on()

    def fail(module, args):
        raise error

    block, shapes = list(served_blocks(unet))[1], []
    handle = block.attn1.to_q.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    models.run(unet)
    handle.remove()
    (rows, tokens, channels), count = shapes[0], block.attn1.heads
    heads = [models.noise(rows, count, tokens, channels // count, seed=seed) for seed in range(3)]
    attended = F.scaled_dot_product_attention(*heads)
    for part in (block.attn1.to_k, block.attn1.to_out[0]):
        handle = part.register_forward_pre_hook(fail)
        with pytest.raises(error):
            models.run(unet)
        handle.remove()
        # torch runs no hook after a KeyboardInterrupt: what stays until the next call is ours, and one call's at most.
        stays = 1 if error is KeyboardInterrupt else 0
        assert [type(mode) for mode in _get_current_function_mode_stack()] == [AroundSdpa] * stays
        assert len(unet._shared_tome.calls) == stays, "no tensor of the call is kept"
        assert torch.equal(F.scaled_dot_product_attention(*heads), attended), "somebody else's attention"
        assert torch.equal(models.run(unet), kept) and no_mode_is_on()
    with pytest.raises(error):
        handle = block.attn1.to_out[0].register_forward_pre_hook(fail)
        models.run(unet)
    handle.remove()
    shared_tome.remove_patch(unet)
    assert no_mode_is_on()
    assert torch.equal(models.run(unet), before) and models.count_hooks(unet) == 0


def test_a_row_does_not_depend_on_those_beside_it():
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config())
    alone = models.run(unet, batch=1)
    torch.testing.assert_close(models.run(unet, batch=3)[:1], alone, rtol=1e-4, atol=1e-5)


def test_a_pipeline_and_a_schedule():
    pipe = models.pipeline()
    shared_tome.apply_patch(pipe, config=config(start=0.5))
    kept = models.generate(pipe, steps=4)
    assert torch.equal(models.generate(pipe, steps=4), kept)
    shared_tome.apply_patch(pipe, config=config(start=0.5, own_token=False))
    assert not torch.equal(models.generate(pipe, steps=4), kept)


def test_a_copy_is_a_model_of_its_own():
    unet = models.sd15()
    before = models.run(unet)
    shared_tome.apply_patch(unet, config=config())
    kept, twin = models.run(unet), copy.deepcopy(unet)
    shared_tome.remove_patch(unet)
    assert torch.equal(models.run(twin), kept) and torch.equal(models.run(unet), before)
    shared_tome.remove_patch(twin)
    assert torch.equal(models.run(twin), before) and models.count_hooks(twin) == 0


def test_threads_do_not_mix():
    """Two calls that are in the same attention at the same time, each with its own grid."""
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config())
    models.check_threads(unet, lambda block: (block.attn1.to_q, block.attn1.to_out[0]))


def test_under_torch_compile_queries_do_not_keep_them(caplog):
    torch._dynamo.reset()
    unet = models.one_level()
    shared_tome.apply_patch(unet, config=config(own_token=False))
    drawn = models.run(unet)
    shared_tome.apply_patch(unet, config=config())
    made = models.run(torch.compile(unet, backend="eager"))
    torch._dynamo.reset()
    torch.testing.assert_close(made, drawn, rtol=1e-4, atol=1e-5)
    assert "under torch.compile" in caplog.text
    assert not torch.allclose(models.run(unet), drawn, rtol=1e-4, atol=1e-5), "and without it they do"


@pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "tome last"])
def test_where_blocks_are_compiled_by_themselves_too(tome_first, caplog):
    """diffusers' compile_repeated_blocks: the model's own hooks run as ever."""
    torch._dynamo.reset()
    drawn = models.run(shared_tome.apply_patch(models.one_level(), config=config(own_token=False)))
    unet = models.one_level()
    for put in ("apply_patch", "compile")[:: 1 if tome_first else -1]:
        if put == "compile":
            unet.compile_repeated_blocks(backend="eager")
        else:
            shared_tome.apply_patch(unet, config=config())
    made = models.run(unet)
    torch._dynamo.reset()
    torch.testing.assert_close(made, drawn, rtol=1e-4, atol=1e-5)
    assert caplog.text.count("under torch.compile own token has no effect") == 1


def test_whether_it_pays_is_measured_with_them(monkeypatch):
    from shared_tome.attention.combine import TORCHS
    from shared_tome.autotune import decisions

    asked = []
    monkeypatch.setattr(decisions, "measures", lambda *_: True)
    monkeypatch.setattr(decisions, "decision_on", lambda *args: asked.append(args[7]))
    unet = models.sd15()
    for own in (True, False):
        shared_tome.apply_patch(unet, config=config(own_token=own))
        models.run(unet)
        assert set(asked) == {TORCHS if own else ()}
        asked.clear()


@pytest.mark.parametrize("ratio", [0.75, 0.6])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_transformers_against_float64(name, ratio, monkeypatch):
    from shared_tome.attention import sequence as joint

    make, run = {"flux": (models.flux, models.run_flux), "sd3": (models.sd3, models.run_sd3)}[name]
    model, seen = make(), []
    attend = joint.JointCall.attend

    def spied(self, q, k, v, start, plan, *more):
        out = attend(self, q, k, v, start, plan, *more)
        seen.append((out, attended(q, k, v, plan, start)))
        return out

    shared_tome.apply_patch(model, config=config(ratio=ratio, own_token=False))
    drawn = run(model)
    monkeypatch.setattr(joint.JointCall, "attend", spied)
    shared_tome.apply_patch(model, config=config(ratio=ratio))
    assert not torch.equal(run(model), drawn)
    assert len(seen) == 3
    for out, expected in seen:
        assert (out.transpose(1, 2).double() - expected).abs().max() < 2e-6


def called(name, **options):
    """A patched model, and what calls it without a word on gradients."""
    wan = dits.DITS["Wan"]
    make, call = {
        "sd15": (models.sd15, inspect.unwrap(models.run)),
        "Wan": (wan.model, lambda model: wan.call(model, (3, 6, 10), models.ALL)),
    }[name]
    model = shared_tome.apply_patch(make(), config=config(**options))
    return model, lambda: call(model)


@pytest.mark.parametrize("name", ["sd15", "Wan"])
def test_where_a_gradient_is_asked_for_it_is_said(name, caplog):
    """The kernels that tell their sums carry none. A loop of one's own easily lacks torch.no_grad()."""
    model, call = called(name)
    model.requires_grad_(True)
    with torch.no_grad():
        kept = call()
    assert NOT_KEPT not in caplog.text
    made = [call().detach() for _ in range(2)]
    drawn = called(name, own_token=False)[1]().detach()
    torch.testing.assert_close(made[1], drawn, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(kept, drawn, rtol=1e-3)
    said = [record.message for record in caplog.records if record.name == "ToMe"]
    assert said == [
        "[ToMe] own token has no effect where a gradient is asked for; use torch.no_grad() where none is wanted"
    ]


def test_a_transformer_without_a_kernel_says_so(caplog):
    call = called("Wan")[1]
    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's too
    try:
        with torch.no_grad():
            call()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert caplog.text.count("own token has no effect: this PyTorch gives no log-sum-exp") == 1


@pytest.mark.parametrize("method", ["sample", "multires"])
@pytest.mark.parametrize("name", ["ZImage", "Wan"])
def test_under_autocast_norms_of_queries_hide_nothing(name, method, monkeypatch, caplog):
    """They leave queries and keys in float32, which torch's attention makes alike by itself."""
    from shared_tome.attention.sequence import JointCall

    attend, found = JointCall.attend, []

    def spied(self, q, k, v, *more):
        found.append((attend(self, q, k, v, *more), q))
        return found[-1][0]

    monkeypatch.setattr(JointCall, "attend", spied)
    model = shared_tome.apply_patch(dits.DITS[name].model(), config=config(method=method))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dits.DITS[name].run(model)
    assert found and all(out is not None and out.dtype == q.dtype == torch.bfloat16 for out, q in found)
    assert caplog.text == ""


def test_autocast_is_torchs_own():
    """Bit for bit what torch's attention gives, which casts by itself; float64 it leaves alone."""
    q, k, v = (models.noise(1, 2, 9, 8, seed=seed) for seed in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in ((q, k, v.bfloat16()), (q.double(), k.double(), v.double())):
            plain = F.scaled_dot_product_attention(*given)
            with AroundSdpa(lambda attention, *heads: attention(*heads)):
                assert torch.equal(F.scaled_dot_product_attention(*given), plain)
    assert as_autocast(q, v.bfloat16())[0] is q
