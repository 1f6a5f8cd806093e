"""The option own_token in AUTOMATIC1111, Forge and reForge: each query attends to itself beside the drawn tokens."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from support.self_token_weights import attended
from torch.overrides import _get_current_function_mode_stack

from . import models, variants
from .host import FIRST, SECOND, VERSION
from .test_forge import _Attention, _hooks, _Loaded, forge_host  # noqa: F401
from .test_hooks import _inputs, _run, _unet

NOT_KEPT = "own token has no effect"
AT_SDPA = {"sdp": variants.sdp, "fixed_size": variants.fixed_size}
ELSEWHERE = ("own_scale", "scaled_keys", "given_size")
LABEL = "ToMe own token"
ON = {"ratio": 0.5, "min_tokens": 0, "own_token": True}


def _attach(tome, model, seeds=(1,), **options):
    config = tome.core.ToMeConfig(**{"ratio": 0.75, "min_tokens": 0, "own_token": True, **options})
    return tome.hooks.PassAttachment(model, tome.sampling.Sampling(config, seeds, tome.notes.Notes()))


def _use(monkeypatch, forward):
    from ldm.modules.attention import CrossAttention

    monkeypatch.setattr(CrossAttention, "forward", forward)


@pytest.fixture
def lines(tome, monkeypatch):
    """What the log gets."""
    found = []
    monkeypatch.setattr(tome.notes.logger, "info", lambda text, *args: found.append(text % args if args else text))
    return found


def _reference(tome, attn1, x, grid, config, seeds):
    """In float64 from the formula of weights; seeds: one a row."""
    plan = tome.core.ModelCall(config, grid, x.device, seed=torch.tensor(seeds)).plan(x, grid)
    q, k, v = (
        (x.double() @ w.weight.double().T).unflatten(-1, (attn1.heads, -1)).transpose(1, 2)
        for w in (attn1.to_q, attn1.to_k, attn1.to_v)
    )
    out = attended(q, k, v, plan).transpose(1, 2).flatten(2)
    return out @ attn1.to_out[0].weight.double().T + attn1.to_out[0].bias.double()


@pytest.mark.parametrize("name", AT_SDPA)
@pytest.mark.parametrize(("ratio", "size"), [(0.75, (16, 16)), (0.6, (15, 17))])
def test_against_float64(tome, monkeypatch, name, ratio, size):
    """Three images with seeds of their own, prompted and not: six rows."""
    _use(monkeypatch, AT_SDPA[name])
    unet, seeds, seen, keys = _unet(mult=(1,)), (1, 2, 3), {}, set()
    attachment = _attach(tome, unet, seeds, ratio=ratio)
    attachment.sampling.begin_step(0, 4, 6)
    attn1 = next(tome.hooks.served_blocks(unet)).attn1
    attn1.register_forward_pre_hook(lambda m, args: seen.setdefault("x", args[0].clone()), prepend=True)
    attn1.to_k.register_forward_hook(lambda m, args, out: keys.add(out.shape[1]))
    attn1.register_forward_hook(lambda m, args, out: seen.setdefault("out", out.clone()))
    _run(unet, _inputs(*size, batch=6))
    attachment.detach()
    seeds = [tome.sampling.fold_seed(seed) for seed in seeds] * 2
    expected = _reference(tome, attn1, seen["x"], size, attachment.sampling.config, seeds)
    assert keys == {size[0] * size[1]}
    assert (seen["out"].double() - expected).abs().max() < 2e-5 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_where_torchs_kernels_refuse_each_image_gets_its_own_drawn_tokens(tome, monkeypatch, ratio):
    """The keys that would be drawn before the projections, by channels where they weigh unequally."""
    _use(monkeypatch, variants.sdp)
    unet, made = _unet(), {}
    monkeypatch.setattr(tome.hooks.JointCall, "attend", lambda *_: None)
    for own in (True, False):
        attachment = _attach(tome, unet, (1, 2, 3), ratio=ratio, own_token=own)
        attachment.sampling.begin_step(0, 4, 6)
        made[own] = _run(unet, _inputs(batch=6))
        attachment.detach()
    torch.testing.assert_close(made[True], made[False], rtol=1e-4, atol=1e-5)


def test_under_multires_the_line_speaks_of_multires(host, tome, monkeypatch, lines):
    """Not of own tokens; and the picture's text claims nothing of them."""
    _use(monkeypatch, variants.SERVED["own_scale"])
    images, p = host.generate([{**ON, "method": "multires"}])
    assert sum("multires needs PyTorch's attention" in line for line in lines) == 1
    assert not any(NOT_KEPT in line for line in lines) and LABEL not in p.extra_generation_params
    drawn, _ = host.generate([{**ON, "own_token": False}])
    assert torch.equal(images[0], drawn[0]), "sample takes its place"


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_other_attention_codes_get_the_drawn_tokens(tome, monkeypatch, lines, name, ratio):
    _use(monkeypatch, variants.SERVED[name])
    unet, made = _unet(), {}
    for own in (True, False):
        attachment = _attach(tome, unet, ratio=ratio, own_token=own)
        made[own] = _run(unet, _inputs())
        attachment.detach()
    assert torch.equal(made[True], made[False])
    assert sum(NOT_KEPT in line for line in lines) == 1


def test_off_changes_nothing(tome, monkeypatch):
    """No trial and no mode where the option is off or the method has no drawn tokens."""
    _use(monkeypatch, variants.sdp)
    unet = _unet()
    monkeypatch.setattr(tome.trials, "meets_at_sdpa", lambda *_, **__: 1 / 0)
    for options in ({"method": "merge"}, {"method": "downsample"}, {"proportional": False}):
        made = []
        for own in (True, False):
            attachment = _attach(tome, unet, **options, own_token=own)
            made.append(_run(unet, _inputs()))
            attachment.detach()
        assert torch.equal(*made)
    for own in (False, True):
        attachment = _attach(tome, unet, own_token=own)
        with pytest.raises(ZeroDivisionError) if own else nullcontext():
            _run(unet, _inputs())
        attachment.detach()


def test_an_exception_leaves_nothing(tome, monkeypatch):
    _use(monkeypatch, variants.sdp)
    unet, inputs = _unet(), _inputs()
    before = _run(unet, inputs)
    attachment = _attach(tome, unet)
    kept = _run(unet, inputs)
    block = list(tome.hooks.served_blocks(unet))[1]
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*_, error=error):
            raise error

        for part in (block.attn1.to_k, block.attn1.to_out[0]):
            handle = part.register_forward_pre_hook(fail)
            with pytest.raises(error):
                _run(unet, inputs)
            handle.remove()
            # torch runs no hook after a KeyboardInterrupt: what stays until the next call is ours.
            left = [tome.core.attention.sdpa.AroundSdpa] if error is KeyboardInterrupt else []
            assert [type(mode) for mode in _get_current_function_mode_stack()] == left
            assert torch.equal(_run(unet, inputs), kept) and not _get_current_function_mode_stack()
    attachment.detach()
    assert torch.equal(_run(unet, inputs), before) and models.count_hooks(unet) == 0


def test_an_image_of_three_is_the_same_made_alone(host, monkeypatch):
    _use(monkeypatch, variants.sdp)
    three, _ = host.generate([ON], seeds=(5, 6, 7), batch_size=3)
    drawn, _ = host.generate([{**ON, "own_token": False}], seeds=(5, 6, 7), batch_size=3)
    for seed, image, other in zip((5, 6, 7), three, drawn, strict=True):
        alone, _ = host.generate([ON], seeds=(seed,))
        assert (alone[0] - image).abs().max() < 1e-3 < (alone[0] - other).abs().max()


def test_the_panel_the_text_and_the_api(host, tome, monkeypatch):
    """The option shows, is written into the picture's text and read back."""
    _use(monkeypatch, variants.sdp)
    default = tome.core.ToMeConfig().own_token
    place = tome.options.NAMES.index("own_token")
    control = host.tabs["txt2img"].inputs[1:][place]
    assert control.label == "Own token" and control.value is default
    images, p = host.generate([{**ON, "own_token": not default}])
    assert p.extra_generation_params[LABEL] is (not default) and not p.troubles
    values = tome.infotext.read({name: str(value) for name, value in p.extra_generation_params.items()})
    assert tome.options.settings_from(values).config.own_token is (not default)
    again, _ = host.generate([values])
    assert torch.equal(images[0], again[0]), "the picture's text makes the same picture again"
    _, p = host.generate([{**ON, "own_token": default}])
    assert LABEL not in p.extra_generation_params


@pytest.mark.parametrize("request_", [{}, {"seeds": (5, 6)}, {"enable_hr": True}], ids=["one", "two batches", "hires"])
def test_a_picture_that_kept_none_does_not_claim_it(host, tome, monkeypatch, lines, request_):
    """What its text says makes the same picture again."""
    _use(monkeypatch, variants.SERVED["own_scale"])
    before_hires = []

    class Script(host.tabs["txt2img"].scripts[0].__class__):
        def before_hr(self, p, *args):  # the host may have saved the first pass's picture by now
            before_hires.append(dict(p.extra_generation_params))

    host.tabs["txt2img"].scripts[0].__class__ = Script
    images, p = host.generate([ON], **request_)
    for text in (p.extra_generation_params, *before_hires):
        (step, *layers), (hires_step, *hires_layers) = FIRST.split(), SECOND.split()
        decided = " ".join([hires_step, hires_layers[0], step, layers[0], hires_layers[1], layers[1]])
        hires = "enable_hr" in request_ and text is p.extra_generation_params
        assert text == {
            "ToMe ratio": 0.5, "ToMe method": "sample", "ToMe min tokens": 0, LABEL: False,
            "ToMe decisions": decided if hires else FIRST, "ToMe version": VERSION,
        }  # fmt: skip
    assert all(f"{LABEL}: False" in text for text in p.processed.infotexts)
    assert not p.troubles and sum(NOT_KEPT in line for line in lines) == 1
    values = tome.infotext.read({name: str(value) for name, value in p.extra_generation_params.items()})
    assert values["own_token"] is False
    again, _ = host.generate([values], **request_)
    assert all(torch.equal(*pair) for pair in zip(images, again, strict=True))


@pytest.mark.parametrize("swapped", [False, True])
def test_one_layer_that_keeps_them_makes_another_picture(host, tome, monkeypatch, lines, swapped):
    """Without the option in its text the picture would not come back."""
    _use(monkeypatch, variants.sdp)
    meets, asked = tome.trials.meets_at_sdpa, []

    def every_other(forward, d, *args):  # the layers of one head size
        asked.append(d)
        return meets(forward, d, *args) and (d == asked[0]) is not swapped

    monkeypatch.setattr(tome.trials, "meets_at_sdpa", every_other)
    images, p = host.generate([ON])
    assert len(set(asked)) == 2 and LABEL not in p.extra_generation_params  # as it is by default
    assert sum(NOT_KEPT in line for line in lines) == 1 and not p.troubles
    drawn, _ = host.generate([{**ON, "own_token": False}])
    assert not torch.equal(images[0], drawn[0])


@pytest.mark.parametrize("kept", [None, True, False])
def test_nothing_is_said_of_own_tokens_where_nothing_was_merged(tome, kept):
    parameters = {"ToMe ratio": 0.5, "ToMe own token": False}
    tome.infotext.write(parameters, tome.options.settings_from({"enabled": True}), {False: False}, kept)
    assert not parameters


# --- Forge and reForge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "size"), [(0.75, (16, 16)), (0.6, (15, 17))])
def test_forge_against_float64(forge_host, tome, ratio, size):  # noqa: F811
    block = forge_host.shared.sd_model.original.unet.model.diffusion_model.blocks[0]
    seen, keys = {}, set()
    block.norm1.register_forward_hook(lambda m, args, out: seen.setdefault("x", out.clone()))
    block.attn1.to_k.register_forward_hook(lambda m, args, out: keys.add(out.shape[1]))
    block.attn1.register_forward_hook(lambda m, args, out: seen.setdefault("out", out.clone()))
    args = {**ON, "ratio": ratio}
    seeds = (5, 6)
    forge_host.generate([args], seeds=seeds, batch_size=2, steps=1, height=size[0] * 8, width=size[1] * 8)
    config = tome.core.ToMeConfig(**args)
    rows = [tome.sampling.fold_seed(seed) for seed in seeds] * 2
    expected = _reference(tome, block.attn1, seen["x"], size, config, rows)
    assert keys == {size[0] * size[1]}
    assert (seen["out"].double() - expected).abs().max() < 1e-5


def test_forge_leaves_nothing(forge_host):  # noqa: F811
    plain, _ = forge_host.generate()
    kept, p = forge_host.generate([ON])
    drawn, _ = forge_host.generate([{**ON, "own_token": False}])
    assert (kept[0] != drawn[0]).any() and not p.troubles
    model = forge_host.shared.sd_model.original.unet.model
    handle = model.diffusion_model.blocks[1].attn1.to_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forge_host.generate([ON])
    handle.remove()
    assert _hooks(forge_host) == 0 and not _get_current_function_mode_stack()
    assert (forge_host.generate([ON])[0][0] == kept[0]).all()
    assert (forge_host.generate()[0][0] == plain[0]).all() and _hooks(forge_host) == 0


def test_forges_other_attention_functions_get_the_drawn_tokens(forge_host, monkeypatch, lines):  # noqa: F811
    def twice(self, x, context=None, value=None, mask=None, transformer_options=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.chunk(2, dim=2)], dim=2)
        return self.to_out(out.transpose(1, 2).flatten(2))

    monkeypatch.setattr(_Attention, "forward", twice)
    assert isinstance(forge_host.shared.sd_model, _Loaded)
    for ratio in (0.5, 0.6):
        made, p = forge_host.generate([{**ON, "ratio": ratio}])
        drawn, _ = forge_host.generate([{**ON, "ratio": ratio, "own_token": False}])
        assert torch.equal(made[0], drawn[0])
        assert p.extra_generation_params[LABEL] is False and not p.troubles
    assert sum(NOT_KEPT in line for line in lines) == 2  # once a request
