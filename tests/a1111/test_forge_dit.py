"""Forge's transformers: their attention functions answered for the time of one call, by the rows of ComfyUI's table."""

from __future__ import annotations

import importlib
import math
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from shared_tome.methods import AUTO_MOST

from .host import VERSION
from .test_forge import _hooks, _Loaded

METHODS = ("sample", "multires", "merge", "merge_queries", "merge_keys", "downsample", "prune")
ON = [{"ratio": 0.5, "min_tokens": 0, "method": "sample"}]
PICTURE, VIDEO = (4, 16, 24), (4, 3, 8, 12)
# class: (its module, latent, grid, tokens beside the image's, attentions of the image)
SMALL = {
    "IntegratedFluxTransformer2DModel": ("flux", PICTURE, (8, 12), 7, 3),
    "NextDiT": ("lumina", PICTURE, (8, 12), 20 + 4, 2),
    "WanModel": ("wan", VIDEO, (3, 4, 6), 0, 2),
    "MMDiTX": ("mmditx", PICTURE, (8, 12), 7, 3),
    "SingleStreamDiT": ("krea", PICTURE, (8, 12), 7, 2),
}


@pytest.fixture(scope="module")
def backend():
    """The modules of forge/backend by their last name."""
    sys.path.insert(0, str(Path(__file__).parent / "forge"))
    names = ("args", "attention", "operations", "nn.flux", "nn.lumina", "nn.wan", "nn.mmditx", "nn.krea")
    yield types.SimpleNamespace(
        **{name.rpartition(".")[2]: importlib.import_module(f"backend.{name}") for name in names}
    )
    sys.path.pop(0)
    for name in [name for name in sys.modules if name.split(".")[0] == "backend"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def clean(backend):
    """No name is left swapped by any test."""
    before = [(vars(module), name, vars(module)[name]) for module, name in _places(backend)]
    yield
    assert all(found[name] is function for found, name, function in before)
    backend.args.dynamic_args.ref_latents = []


def _places(backend):
    modules = (backend.flux, backend.lumina, backend.wan, backend.krea)
    return [*((module, "attention_function") for module in modules), (backend.mmditx, "attention")]


@pytest.fixture
def lines(tome, monkeypatch):
    """What the log gets."""
    found = []
    monkeypatch.setattr(tome.notes.logger, "info", lambda text, *args: found.append(text % args if args else text))
    return found


def _made(backend, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(getattr(backend, SMALL[name][0]), name)().eval()


@pytest.fixture
def flux_host(host, backend):
    host.shared.sd_model, host.forge = _Loaded(diffusion_model=_made(backend, "IntegratedFluxTransformer2DModel")), True
    return host


@pytest.fixture
def call_of(tome, backend):
    """One call of a small model: (config's values or None, seeds, ...) -> (what it gives, its sampling)."""

    def make(name, values=None, seeds=(5,), model=None, latent=None, prompts=2, own=None, **c):
        loaded = _Loaded(diffusion_model=_made(backend, name) if model is None else model)
        sampling = None
        if values is not None:
            config = tome.core.ToMeConfig(**{"min_tokens": 0, "ratio": 0.5, "method": "sample", **values})
            sampling = tome.sampling.Sampling(config, seeds, tome.notes.Notes(), report=True, self_token_found=own)
            tome.forge.patch(loaded, sampling)
        shape = latent or SMALL[name][1]
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        text = torch.randn(prompts, 7, 16, generator=torch.Generator().manual_seed(1))
        unet = loaded.forge_objects.unet
        c = {"c_crossattn": text.repeat_interleave(len(seeds), 0), "transformer_options": {}, **c}
        wrapper = unet.model_options.get("model_function_wrapper", lambda f, args: f(x, args["timestep"], **args["c"]))
        x = x.repeat(prompts, *(1,) * len(shape))
        with torch.no_grad():
            return wrapper(unet.model.apply_model, {"input": x, "timestep": torch.ones(len(x)), "c": c}), sampling

    return make


@pytest.fixture
def seen(monkeypatch):
    """(queries, keys) of each call of torch's attention, whatever kernel."""
    found = []
    real = F.scaled_dot_product_attention

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is real:
                found.append((args[0].shape[-2], args[1].shape[-2]))
            return func(*args, **(kwargs or {}))

    with Watch():
        yield found


@pytest.fixture
def layers(tome, monkeypatch):
    """What each merged layer was given and gave: (plan, call, q, k, v, start, out)."""
    walk, found = tome.forge.forge_dit.TransformerCall, []
    real = walk.serve

    def spy(self, call, plan, kind):
        out = real(self, call, plan, kind)
        found.append((plan, call, call.q, call.k, call.v, kind.start, out))
        return out

    monkeypatch.setattr(walk, "serve", spy)
    return found


@pytest.mark.parametrize("ratio", [0.75, 0.6])
@pytest.mark.parametrize("name", SMALL)
def test_a_layer_is_what_float64_says(call_of, layers, name, ratio):
    """softmax(q k' + log(how many each key stands for)) v' over the drawn keys; all others stay."""
    _, _, grid, others, count = SMALL[name]
    call_of(name, {"ratio": ratio, "own_token": False})
    assert len(layers) == count
    for plan, call, q, k, v, start, out in layers:
        q, k, v = (x.double() for x in call.by_head())
        length = k.shape[2]
        assert plan.tokens == math.prod(grid) and length - plan.tokens in (0, others)
        places = torch.cat((torch.arange(start), plan.index[0] + start, torch.arange(start + plan.tokens, length)))
        weights = torch.ones(len(places), dtype=torch.float64)
        weights[start : start + plan.kept] = plan.sizes[0].double()
        assert weights.sum() == length
        logits = q @ k[:, :, places].transpose(-1, -2) * q.shape[-1] ** -0.5 + weights.log()
        truth = (logits.softmax(-1) @ v[:, :, places]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(out.double(), truth, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SMALL)
def test_the_images_tokens_go_and_all_others_stay(backend, call_of, layers, lines, name, method):
    """Refiners and cross-attentions see what they saw, and so does everything afterwards."""
    model, count = _made(backend, name), SMALL[name][4]
    plain, _ = call_of(name, model=model)
    merged, sampling = call_of(name, {"method": method}, model=model)
    assert merged.shape == plain.shape and merged.isfinite().all() and not torch.equal(merged, plain)
    assert len(layers) == count
    assert torch.equal(call_of(name, {"method": method}, model=model)[0], merged)
    assert torch.equal(call_of(name, model=model)[0], plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    report = sampling.run.tally.report()
    assert len(report.merged) == count and not report.left_alone and report.merged[0].level == 0
    for values in ({"ratio": 0.0}, {"min_tokens": 4096}, {"start": 0.9}):
        assert torch.equal(call_of(name, {"method": method, **values}, model=model)[0], plain)


def test_what_runs_outside_of_the_blocks_or_looks_at_others_sees_all(call_of, seen):
    call_of("NextDiT", {"method": "merge_keys"})
    assert seen == [(20, 20), (100, 100), (120, 72), (120, 72)], "refiners of the prompt and of the image, then blocks"
    seen.clear()
    call_of("WanModel", {"method": "merge_keys"})
    assert seen == [(72, 36), (72, 7)] * 2


def test_rows_outside_of_the_blocks_are_nobodys(call_of, lines):
    """Krea 2 fuses the layers of its prompt, a row for each token."""
    call_of("SingleStreamDiT", {}, (5, 6))
    assert not lines


@pytest.mark.parametrize("name", SMALL)
def test_odd_sizes(call_of, layers, name):
    latent = (*SMALL[name][1][:-2], 15, 25)
    plain, _ = call_of(name, latent=latent)
    merged, _ = call_of(name, {"ratio": 0.7}, latent=latent)
    assert merged.isfinite().all() and not torch.equal(merged, plain) and len(layers) == SMALL[name][4]


@pytest.mark.parametrize("method", ["sample", "multires", "merge", "prune"])
@pytest.mark.parametrize("name", SMALL)
def test_an_image_of_three_is_the_same_made_alone(call_of, name, method):
    seeds = (5, 6, 7)
    together, _ = call_of(name, {"method": method}, seeds)
    for place, seed in enumerate(seeds):
        alone, _ = call_of(name, {"method": method}, (seed,))
        torch.testing.assert_close(together[place :: len(seeds)], alone, atol=1e-4, rtol=1e-4)
    twice, _ = call_of(name, {"method": method}, (5, 5))
    torch.testing.assert_close(twice[1::2], twice[::2], atol=1e-4, rtol=1e-4)


def test_seeds_draw_apart(call_of, tome, layers):
    call_of("IntegratedFluxTransformer2DModel", {"own_token": False}, (5, 6))
    assert len(layers) == 6 and not torch.equal(layers[0][0].index, layers[1][0].index)


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("IntegratedFluxTransformer2DModel", "keyword"),
        ("IntegratedFluxTransformer2DModel", "Forge Neo's global"),
        ("SingleStreamDiT", "keyword"),
    ],
)
def test_references_stay(backend, call_of, layers, name, by):
    refs = [torch.ones(1, 4, 10, 13), torch.ones(1, 4, 8, 8)]
    told = {"ref_latents": refs} if by == "keyword" else {}
    if by != "keyword":
        backend.args.dynamic_args.ref_latents = refs
    call_of(name, {}, **told)
    assert [(start, k.shape[2]) for _, _, _, k, _, start, _ in layers] == [(7, 7 + 96 + 35 + 16)] * SMALL[name][4]


def test_a_mask_over_the_keys(backend, call_of, layers):
    """Of each row one, which goes with the row's image."""
    mask = torch.zeros(4, 1, 120, 120)
    mask[0, ..., :5] = mask[2, ..., :5] = -1e4
    model = _made(backend, "NextDiT")
    values = {"own_token": False}
    together, _ = call_of("NextDiT", values, (5, 6), model=model, attention_mask=mask)
    alone, _ = call_of("NextDiT", values, (5,), model=model, attention_mask=mask[::2])
    torch.testing.assert_close(together[::2], alone, atol=1e-4, rtol=1e-4)
    assert layers[0][1].mask.shape[0] == 2 and layers[0][1].mask.min() < layers[1][1].mask.min() == 0


# --- Nothing left behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("name", SMALL)
def test_an_error_leaves_nothing(backend, call_of, name, error):
    model = _made(backend, name)
    plain, _ = call_of(name, model=model)

    def fail(*_):
        raise error

    handle = list(model.modules())[-1].register_forward_hook(fail)
    with pytest.raises(error):
        call_of(name, {}, model=model)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(call_of(name, model=model)[0], plain)


def test_another_thread_has_the_hosts_own_function(backend, call_of, layers):
    """While a call runs here, and beside a call of its own."""
    model = _made(backend, "IntegratedFluxTransformer2DModel")
    plain, merged = (call_of("IntegratedFluxTransformer2DModel", values, model=model)[0] for values in (None, {}))
    layers.clear()
    found = {}

    def run(*_):
        if threading.current_thread() is not threading.main_thread() or found:
            return
        for key, values in (("plain", None), ("merged", {})):
            found[key] = None
            thread = threading.Thread(
                target=lambda key=key, values=values: found.__setitem__(
                    key, call_of("IntegratedFluxTransformer2DModel", values, model=model)[0]
                )
            )
            thread.start()
            thread.join()

    handle = model.single_blocks[0].register_forward_pre_hook(run)
    here, _ = call_of("IntegratedFluxTransformer2DModel", {}, model=model)
    handle.remove()
    assert torch.equal(found["plain"], plain) and torch.equal(found["merged"], merged) and torch.equal(here, merged)


def test_calls_that_end_in_another_order_leave_the_hosts_own(tome, backend):
    """The first to begin ends first, while the other still runs."""
    swapped, calls = tome.forge.forge_dit.swapped, []
    original, places = backend.flux.attention_function, [(backend.flux, "attention_function")]
    begun, ended = threading.Event(), threading.Event()

    def other():
        with swapped(places, lambda func, *args: calls.append("other")):
            begun.set()
            ended.wait(5)
            backend.flux.attention_function()

    thread = threading.Thread(target=other)
    with swapped(places, lambda func, *args: calls.append("main")):
        thread.start()
        assert begun.wait(5)
        backend.flux.attention_function()
    assert backend.flux.attention_function is not original
    ended.set()
    thread.join()
    assert calls == ["main", "other"] and backend.flux.attention_function is original


def test_what_another_extension_puts_there_meanwhile_stays(tome, backend, monkeypatch):
    original = backend.flux.attention_function
    with tome.forge.forge_dit.swapped([(backend.flux, "attention_function")], lambda func, *args: "answered"):
        held = backend.flux.attention_function
        assert held() == "answered"
        backend.flux.attention_function = theirs = lambda *args: held(*args)
    assert backend.flux.attention_function is theirs
    backend.flux.attention_function = lambda *args: "host"
    backend.flux.attention_function = original
    x = torch.randn(1, 4, 32)
    assert torch.equal(theirs(x, x, x, 2), original(x, x, x, 2)), "what they hold does what the host's function does"


# --- Which attention runs ---------------------------------------------------------------------------------------------


def _use(monkeypatch, backend, function):
    for module in (backend.attention, backend.flux, backend.lumina, backend.wan, backend.krea):
        monkeypatch.setattr(module, "attention_function", function)


def test_pytorchs_attention_steps_in_where_heads_do_not_fit(backend, call_of, lines, monkeypatch):
    """Heads of 16 channels become 64, which SageAttention knows. Of 128 channels they would become 136."""
    _use(monkeypatch, backend, backend.attention.attention_sage)
    call_of("IntegratedFluxTransformer2DModel", {"method": "merge"})
    assert not lines

    def one_wide_head(q, k, v, transformer_options):
        q, k, v = (F.pad(x, (0, 96))[:, None] for x in (q, k, v))
        return backend.flux.attention_function(q, k, v, 1, skip_reshape=True)[..., :32]

    monkeypatch.setattr(backend.flux, "attention", one_wide_head)
    out, _ = call_of("IntegratedFluxTransformer2DModel", {"method": "merge", "levels": "0"})
    of_136 = "where keys need weights (text beside the image, or an uneven ratio) and so heads of 136 channels"
    assert lines == [f"[ToMe] PyTorch's attention takes the place of attention_sage {of_136}"]
    lines.clear()
    plain, _ = call_of("IntegratedFluxTransformer2DModel")
    unpaid, _ = call_of("IntegratedFluxTransformer2DModel", {"method": "merge"})
    assert lines == [f"[ToMe] ToMe skips an attention {of_136}: attention_sage may not take them"]
    assert torch.equal(unpaid, plain) and out.isfinite().all() and not torch.equal(out, plain)


def test_own_tokens_and_what_is_told_of_them(flux_host, backend, lines, monkeypatch):
    kept, p = flux_host.generate(ON)
    assert "ToMe own token" not in p.extra_generation_params and not [line for line in lines if "own" in line]
    without, p = flux_host.generate([{**ON[0], "own_token": False}])
    assert p.extra_generation_params["ToMe own token"] is False and (kept[0] != without[0]).any()
    lines.clear()
    _use(monkeypatch, backend, backend.attention.attention_sage)
    other, p = flux_host.generate(ON)
    assert p.extra_generation_params["ToMe own token"] is False
    assert sum("own token has no effect" in line for line in lines) == 1
    torch.testing.assert_close(other[0], without[0], atol=1e-4, rtol=1e-4)
    _, p = flux_host.generate([{**ON[0], "exact_every": 3}])  # which is of U-Nets
    assert "ToMe ratio" in p.extra_generation_params and "ToMe exact every" not in p.extra_generation_params


@pytest.mark.parametrize("name", SMALL)
def test_all_these_attentions_are_pytorchs(call_of, name):
    """SD3's is by another name, and keeps own tokens as the others do."""
    found = []
    call_of(name, {}, own=found.append)
    assert found == [True] * SMALL[name][4]


# --- In the host ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_the_host(flux_host, method):
    args = [{**ON[0], "method": method}]
    plain, _ = flux_host.generate()
    merged, p = flux_host.generate(args)
    assert (merged[0] != plain[0]).any() and merged[0].isfinite().all() and not p.troubles
    assert p.extra_generation_params["ToMe method"] == method
    assert (flux_host.generate(args)[0][0] == merged[0]).all()
    assert (flux_host.generate()[0][0] == plain[0]).all() and _hooks(flux_host) == 0


def test_the_line_and_the_text(flux_host, lines):
    _, p = flux_host.generate(ON, steps=4, enable_hr=True)
    line = (
        "sample 0.5, level 0 (8x8): 64 to 32 tokens in 3 layers, in 4 of 4 steps; hires pass: sample 0.5, level 0 "
        "(12x12): 144 to 72 tokens in 3 layers, in 3 of 3 steps"
    )
    assert f"[ToMe] {line}" in lines and f"ToMe: {line}" in p.comments
    decided = {"ToMe decisions": "+12x12 +12x12/32/2/256 +8x8 +8x8/32/2/256", "ToMe version": VERSION}
    assert p.extra_generation_params == {"ToMe ratio": 0.5, "ToMe method": "sample", "ToMe min tokens": 0, **decided}


@pytest.mark.parametrize("sign", "+-")
def test_decisions_that_are_set(flux_host, sign):
    plain, _ = flux_host.generate()
    merged, _ = flux_host.generate(ON)
    found, p = flux_host.generate([{**ON[0], "decisions": f"{sign}8x8/32/2/256"}])
    assert (found[0] == (merged if sign == "+" else plain)[0]).all()
    assert (plain[0] != merged[0]).any() and bool(p.extra_generation_params) == (sign == "+")


def test_the_schedule_goes_by_the_noise_level(flux_host, lines):
    plain, _ = flux_host.generate(steps=4)
    late, p = flux_host.generate([{**ON[0], "start": 0.5}], steps=4)
    assert (late[0] != plain[0]).any() and any("in 2 of 4 steps" in line for line in lines)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"min_tokens": 2048}, "fewer than min tokens 2048"),
        ({"ratio": 0.001}, "the ratio takes away no whole token"),
        ({"start": 0.95}, "start 0.95 and end 1 leave out all 3 steps that were run"),
        ({"levels": "1"}, "Flux has one resolution, level 0; levels '1' would merge nothing"),
        (
            {"method": "merge", "mlp": True},
            "mlp needs a model with a U-Net; Flux is served at its self-attention alone",
        ),
        (
            {"method": "merge", "cross_attention": True},
            "cross_attention needs a model with a U-Net; Flux is served at its self-attention alone",
        ),
    ],
)
def test_why_nothing_is_merged(flux_host, lines, values, why):
    plain, _ = flux_host.generate()
    found, p = flux_host.generate([{**ON[0], **values}])
    assert (plain[0] == found[0]).all() and not p.extra_generation_params
    assert sum(why in text for text in p.comments) == 1 and sum(why in line for line in lines) == 1


def test_another_extension_that_replaces_the_attentions_is_told(flux_host, lines):
    """Whatever runs in their place does not ask the function."""
    model = flux_host.shared.sd_model.original.unet.model.diffusion_model
    for block in model.single_blocks:
        block.forward = lambda x, options: x * 0.5
    model.double_blocks[0].forward = lambda img, txt, options: (img * 0.5, txt)
    plain, _ = flux_host.generate()
    found, p = flux_host.generate(ON)
    assert (plain[0] == found[0]).all() and not p.extra_generation_params
    assert any("another extension has replaced them" in text for text in p.comments)


def test_an_extension_that_cuts_the_picture_into_tiles_is_told(flux_host, lines):
    """Its wrapper runs the model on parts of the latent."""

    def tiles(apply_model, args):
        halves = args["input"].chunk(2, dim=-1)
        return torch.cat([apply_model(half, args["timestep"], **args["c"]) for half in halves], dim=-1)

    flux_host.shared.sd_model.original.unet.set_model_unet_function_wrapper(tiles)
    plain, _ = flux_host.generate()
    found, p = flux_host.generate(ON)
    assert (plain[0] == found[0]).all() and not p.extra_generation_params
    assert any("or cuts the picture into tiles" in text for text in p.comments)


def test_a_batch_in_the_host(flux_host):
    four, _ = flux_host.generate(ON, seeds=(5, 6, 7, 8), batch_size=4)
    for seed, image in zip((5, 6, 7, 8), four, strict=True):
        alone, _ = flux_host.generate(ON, seeds=(seed,))
        assert (alone[0] - image).abs().max() < 1e-3


@pytest.mark.parametrize(
    "values",
    [{"method": "sample"}, {"method": "multires"}, {"method": "merge"}, {"method": "merge", "share_match": True}],
)
def test_a_map_of_each_image(flux_host, values):
    """The map of an image of a batch is that of the image alone."""
    args = [{**ON[0], **values, "map": True}]
    images, p = flux_host.generate(args, seeds=(5, 6), batch_size=2)
    maps = p.processed.images[3:]
    assert len(maps) == 2
    for seed, image, drawn in zip((5, 6), images, maps, strict=True):
        alone, q = flux_host.generate(args, seeds=(seed,))
        assert (alone[0] - image).abs().max() < 1e-3
        assert q.processed.images[1].tobytes() == drawn.tobytes()


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_auto_is_multires_where_its_kernel_runs(flux_host, tome, lines, monkeypatch, ratio):
    """At most at a share of the ratio, and the text says what was done."""
    patcher = flux_host.shared.sd_model.original.unet
    monkeypatch.setattr(type(patcher), "load_device", torch.device("cpu"), raising=False)
    args = [{"ratio": ratio, "min_tokens": 0, "method": "auto"}]
    by_sample, p = flux_host.generate(args)
    assert p.extra_generation_params["ToMe method"] == "sample"
    with monkeypatch.context() as patched:
        patched.setattr(tome.forge.forge_dit.kernels, "serves", lambda *tensors: True)
        found, p = flux_host.generate(args)
    most = min(ratio, AUTO_MOST)
    assert p.extra_generation_params["ToMe method"] == "multires" and p.extra_generation_params["ToMe ratio"] == most
    assert sum(f"on a transformer auto takes at most ratio {AUTO_MOST:g}" in line for line in lines) == (
        ratio > AUTO_MOST
    )
    named, _ = flux_host.generate([{"ratio": most, "min_tokens": 0, "method": "multires"}])
    assert (found[0] == named[0]).all() and (found[0] != by_sample[0]).any()


@pytest.mark.parametrize("pays", [True, False])
def test_levels_auto_measures_each_layer(flux_host, tome, lines, monkeypatch, pays):
    module = sys.modules[tome.forge.forge_dit.TransformerCall.__module__]
    asked = []

    def known_or_measured(key, device, measure):
        asked.append(key)
        return module.Decision(100.0, 40.0 if pays else 99.0, 5.0)

    decisions = sys.modules[module.DiTDecisions.__module__]
    monkeypatch.setattr(decisions, "measures", lambda config, grid, device: config.levels == "auto")
    monkeypatch.setattr(module, "known_or_measured", known_or_measured)
    plain, _ = flux_host.generate()
    found, p = flux_host.generate(ON)
    assert ((plain[0] != found[0]).any() == pays) and bool(p.extra_generation_params) == pays
    assert asked and all(key.startswith("Flux, ") and "attention_pytorch" in key for key in asked)
    assert pays or any("nothing was merged" in text for text in p.comments)
    asked.clear()
    by_hand, _ = flux_host.generate([{**ON[0], "levels": "0"}])
    assert (by_hand[0] != plain[0]).any() and not asked


def test_a_compiled_model_is_left_alone(flux_host, lines):
    model = flux_host.shared.sd_model.original.unet.model
    model._torch_compile_config = ("guard_filter_fn",)
    plain, _ = flux_host.generate()
    found, p = flux_host.generate(ON)
    assert (plain[0] == found[0]).all() and not p.extra_generation_params
    assert sum("under torch.compile" in line for line in lines) == 1


# --- The table --------------------------------------------------------------------------------------------------------


def test_each_row_of_forge_says_where_its_blocks_are(tome):
    for row in tome.forge.forge_dit.DIT_MODELS:
        assert bool(row.forge) == bool(row.blocks), row.name


def test_a_subclass_that_runs_in_another_way_is_refused_by_name(host, backend, lines):
    class Faster(backend.flux.IntegratedFluxTransformer2DModel):
        def forward(self, x, t, context=None, transformer_options=None, **kwargs):
            return x * 0.1

    host.shared.sd_model, host.forge = _Loaded(diffusion_model=Faster()), True
    plain, _ = host.generate()
    found, p = host.generate(ON)
    assert (plain[0] == found[0]).all() and any("(Faster) is not served in this program" in text for text in p.comments)


@pytest.mark.parametrize("kind", ["SVDQFluxTransformer2DModel", "patch_nunchaku_zimage.<locals>.NunchakuZImage2DModel"])
def test_nunchakus_are_refused_with_the_reason(host, backend, lines, kind):
    base = backend.lumina.NextDiT
    made = type(kind.rpartition(".")[2], (base,), {"__module__": "backend.nn.svdq", "__qualname__": kind})
    host.shared.sd_model, host.forge = _Loaded(diffusion_model=made()), True
    found, p = host.generate(ON)
    assert any("ToMe does not serve Nunchaku's" in text and "own kernels" in text for text in p.comments)
    assert not p.extra_generation_params
