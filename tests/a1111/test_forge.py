"""Forge and reForge: their patched U-Net played by a small one that takes ComfyUI's patches."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .host import HIGHEST

ON = [{"ratio": 0.5, "min_tokens": 0}]
LEFT = "ToMe skips a self-attention that another node or extension replaces"


class _Attention(nn.Module):
    """As Forge's: the head size from what the projections give; value apart from context."""

    def __init__(self, channels, heads, context=None):
        super().__init__()
        self.heads, self.dim_head = heads, channels // heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = (nn.Linear(context or channels, channels, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x, context=None, value=None, mask=None, transformer_options=None):
        context = x if context is None else context
        value = context if value is None else value
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(value)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.n_heads, self.d_head = heads, channels // heads
        self.attn1 = _Attention(channels, heads)
        self.ff = nn.Sequential(nn.Linear(channels, channels), nn.GELU())
        self.norm1, self.norm3 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        with torch.random.fork_rng():
            self.attn2, self.norm2 = _Attention(channels, heads, 16), nn.LayerNorm(channels)

    def forward(self, x, prompt, options):
        extra = {name: value for name, value in options.items() if name not in ("patches", "patches_replace")}
        extra |= {"n_heads": self.n_heads, "dim_head": self.d_head}
        patches, n, context, value = options.get("patches", {}), self.norm1(x), None, None
        for patch in patches.get("attn1_patch", ()):
            context = n if context is None else context
            n, context, value = patch(n, context, context if value is None else value, extra)
        out = self.attn1(n, context=context, value=value)
        for patch in patches.get("attn1_output_patch", ()):
            out = patch(out, extra)
        x = x + out
        n, context, value = self.norm2(x), prompt, prompt
        for patch in patches.get("attn2_patch", ()):
            n, context, value = patch(n, context, value, extra)
        replace, here = options.get("patches_replace", {}).get("attn2", {}), options["block"]
        if here in replace:
            q, k, v = self.attn2.to_q(n), self.attn2.to_k(context), self.attn2.to_v(value)
            out = self.attn2.to_out(replace[here](q, k, v, extra))
        else:
            out = self.attn2(n, context=context, value=value)
        for patch in patches.get("attn2_output_patch", ()):
            out = patch(out, extra)
        x = x + out
        return x + self.ff(self.norm3(x))


class _UNet(nn.Module):
    """Two levels on tokens; odd sizes halve with (n + 1) // 2. Tells the grid only where `tells` is on (reForge)."""

    def __init__(self, tells):
        super().__init__()
        self.tells, self.model_channels, self.channel_mult = tells, 32, (1, 1)
        self.into, self.back = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)
        self.blocks = nn.ModuleList([_Block(32, 4), _Block(32, 4)])
        self.down = nn.Conv2d(32, 32, 3, stride=2, padding=1)

    def forward(self, x, t, context=None, transformer_options=None, **kwargs):
        options, h = transformer_options or {}, self.into(x)
        for number, block in enumerate(self.blocks):
            options["block"] = ("input", number)
            if self.tells:
                options["activations_shape"] = list(h.shape)
            size = h.shape[-2:]
            h = h + block(h.flatten(2).transpose(1, 2), context, options).transpose(1, 2).unflatten(2, size)
            if number == 0:
                h = self.down(h)
        return F.interpolate(self.back(h), x.shape[-2:])


def _level_at(percent):
    return HIGHEST * (1.0 - percent)


class _KModel(nn.Module):
    def __init__(self, tells=False):
        super().__init__()
        self.diffusion_model = _UNet(tells)
        # Where the two programs keep it.
        setattr(self, "model_sampling" if tells else "predictor", types.SimpleNamespace(percent_to_sigma=_level_at))

    def apply_model(self, x, t, c_crossattn=None, transformer_options=None, **kwargs):
        # reForge knows the first and would call it; neither is for these hosts.
        assert not {"wrappers", "optimized_attention_override"} & set(transformer_options)
        return self.diffusion_model(x, t, context=c_crossattn, transformer_options=transformer_options, **kwargs)


class _Patcher:
    def __init__(self, model):
        self.model, self.model_options = model, {"transformer_options": {}}

    def clone(self):
        twin = _Patcher(self.model)
        twin.model_options = copy.deepcopy(self.model_options)
        return twin

    def set_model_unet_function_wrapper(self, wrapper):
        self.model_options["model_function_wrapper"] = wrapper


class _Loaded:
    """Forge's sd_model. The sampler goes through forge_objects.unet, rows [prompts of all images, negatives]."""

    def __init__(self, tells=False, diffusion_model=None):
        torch.manual_seed(0)
        model = _KModel(tells)
        for block in model.diffusion_model.blocks:
            block.attn1.to_q.weight.data *= 4
            block.attn1.to_k.weight.data *= 4
        if diffusion_model is not None:
            model.diffusion_model = diffusion_model
        self.original = types.SimpleNamespace(unet=_Patcher(model))
        self.model = types.SimpleNamespace(diffusion_model=self._run)
        self.reset()

    def reset(self):
        self.forge_objects = types.SimpleNamespace(unet=self.original.unet)

    def _run(self, x, sigma, context=None):
        options = self.forge_objects.unet.model_options
        c = {"c_crossattn": context, "transformer_options": options["transformer_options"].copy()}
        apply_model = self.forge_objects.unet.model.apply_model
        wrapper = options.get("model_function_wrapper")
        if wrapper is None:
            return apply_model(x, sigma, **c)
        return wrapper(apply_model, {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": [0, 1]})


@pytest.fixture(params=[False, True], ids=["forge", "reforge"])
def forge_host(host, request):
    host.shared.sd_model, host.forge = _Loaded(request.param), True
    return host


def _hooks(host):
    model = host.shared.sd_model.original.unet.model
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("method", ["sample", "merge", "merge_queries", "merge_keys", "downsample", "prune"])
def test_every_method_and_nothing_left(forge_host, method):
    args = [{**ON[0], "method": method}]
    plain, _ = forge_host.generate()
    merged, p = forge_host.generate(args)
    assert (merged[0] != plain[0]).any() and merged[0].isfinite().all() and not p.troubles
    assert (forge_host.generate(args)[0][0] == merged[0]).all()
    assert (forge_host.generate()[0][0] == plain[0]).all() and _hooks(forge_host) == 0


def test_keys_weigh_as_much_as_they_stand_for(forge_host, tome):
    """Against float64, as in test_hooks."""
    from .test_hooks import _reference

    block = forge_host.shared.sd_model.original.unet.model.diffusion_model.blocks[0]
    seen = {}
    block.norm1.register_forward_hook(lambda m, args, out: seen.setdefault("x", out.clone()))
    forge_host.generate([{**ON[0], "method": "merge"}], steps=1)
    sampling = tome.core.ToMeConfig(ratio=0.5, min_tokens=0, method="merge")
    expected, bias = _reference(tome, block.attn1, seen["x"], (16, 16), sampling, 1)
    config = sampling.replace(proportional=False)
    without, _ = _reference(tome, block.attn1, seen["x"], (16, 16), config, 1)
    found = []
    block.attn1.register_forward_hook(lambda m, args, out: found.append(out))
    forge_host.generate([{**ON[0], "method": "merge"}], steps=1)
    call = tome.core.ModelCall(sampling, (16, 16), torch.device("cpu"), seed=torch.tensor([1]))
    layer = call.attention(seen["x"], seen["x"], seen["x"], (16, 16))
    out = layer.unmerge(found[0]).double()
    assert bias is not None and (out - expected).abs().max() < 1e-5 < (without - expected).abs().max()


def test_odd_sizes(forge_host):
    plain, _ = forge_host.generate(width=328, height=264, steps=1)
    merged, p = forge_host.generate(ON, width=328, height=264, steps=1)
    assert (merged[0] != plain[0]).any() and merged[0].isfinite().all() and not p.troubles


def test_the_second_call_in_hires_is_idempotent(forge_host, tome, monkeypatch):
    ratios = []
    original = tome.sampling.Sampling.call

    def call(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        ratios.append(made.config.ratio if made is not None else 0.0)
        return made

    monkeypatch.setattr(tome.sampling.Sampling, "call", call)
    forge_host.generate([{**ON[0], "hires_ratio": 0.25}], enable_hr=True)
    assert ratios == [0.5] * 3 + [0.25] * 2, "one merge a call, however often the callback came"
    wrapper = forge_host.shared.sd_model.forge_objects.unet.model_options["model_function_wrapper"]
    assert wrapper.inner is None


def test_hires_off_takes_the_wrapper_out_again(forge_host):
    forge_host.generate([{**ON[0], "hires_ratio": 0.0}], enable_hr=True)
    assert "model_function_wrapper" not in forge_host.shared.sd_model.forge_objects.unet.model_options


def test_a_wrapper_of_another_extension_is_called(forge_host):
    calls = []

    def other(apply_model, args):
        calls.append(args["input"].shape[0])
        return apply_model(args["input"], args["timestep"], **args["c"])

    forge_host.shared.sd_model.original.unet.set_model_unet_function_wrapper(other)
    plain, _ = forge_host.generate()
    count = len(calls)
    merged, _ = forge_host.generate(ON)
    assert len(calls) == 2 * count and (merged[0] != plain[0]).any()


def test_a_clone_made_after_us_keeps_the_step(forge_host, tome):
    """clone() copies model_options deeply."""
    merged, _ = forge_host.generate([{**ON[0], "start": 0.5}], steps=4)
    plain, _ = forge_host.generate(steps=4)
    script = type(forge_host.tabs["txt2img"].scripts[0])
    original = script.process_before_every_sampling

    def and_clone(self, p, *args, **kwargs):
        original(self, p, *args, **kwargs)
        p.sd_model.forge_objects.unet = p.sd_model.forge_objects.unet.clone()

    script.process_before_every_sampling = and_clone
    try:
        again, _ = forge_host.generate([{**ON[0], "start": 0.5}], steps=4)
    finally:
        script.process_before_every_sampling = original
    assert (again[0] == merged[0]).all() and (merged[0] != plain[0]).any()


def test_the_schedule_goes_by_the_noise_level(forge_host, tome, monkeypatch):
    ratios, original = [], tome.sampling.Sampling.call

    def call(self, *arguments, **kwargs):
        made = original(self, *arguments, **kwargs)
        ratios.append(0.0 if made is None else made.config.ratio)
        return made

    monkeypatch.setattr(tome.sampling.Sampling, "call", call)
    request = {"steps": 4, "enable_hr": True, "calls_twice": True}
    forge_host.generate([{**ON[0], "start": 0.5}], **request)
    first, hires = ratios[:7], ratios[7:]  # which begins a step later; the second call is at the next step's level
    assert first == [0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5] and hires == [0.0, 0.5, 0.5, 0.5, 0.5]


def test_an_image_of_four_is_the_same_made_alone(forge_host):
    four, _ = forge_host.generate(ON, seeds=(5, 6, 7, 8), batch_size=4)
    for seed, image in zip((5, 6, 7, 8), four, strict=True):
        alone, _ = forge_host.generate(ON, seeds=(seed,))
        assert (alone[0] - image).abs().max() < 1e-3


def test_an_exception_leaves_no_hook(forge_host):
    model = forge_host.shared.sd_model.original.unet.model
    handle = model.diffusion_model.blocks[1].norm3.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forge_host.generate([{**ON[0], "method": "merge", "mlp": True}])
    handle.remove()
    assert _hooks(forge_host) == 0


def test_mlp(forge_host):
    sizes = set()
    for block in forge_host.shared.sd_model.original.unet.model.diffusion_model.blocks:
        block.ff[1].register_forward_hook(lambda m, args, out: sizes.add(out.shape[1]))
    forge_host.generate([{**ON[0], "method": "merge", "mlp": True}])
    assert sizes == {128, 32}


def test_tiled_tokens_are_left_alone(forge_host):
    """Forge's HyperTile: a quarter of the tokens in four times the rows looks like the next level."""

    def tile(q, k, v, extra):
        return tuple(t.reshape(-1, t.shape[1] // 4, t.shape[2]) for t in (q, k, v))

    def untile(out, extra):
        return out.reshape(-1, out.shape[1] * 4, out.shape[2])

    patches = {"attn1_patch": [tile], "attn1_output_patch": [untile]}
    forge_host.shared.sd_model.original.unet.model_options["transformer_options"]["patches"] = patches
    plain, _ = forge_host.generate()
    assert (forge_host.generate(ON)[0][0] == plain[0]).all()


def test_a_refiner_is_patched_too(forge_host):
    base, refiner = forge_host.shared.sd_model, _Loaded()

    def make(args):
        forge_host.shared.sd_model = base
        refiner.reset()
        return forge_host.generate(args, steps=4, refiner=refiner)[0][0]

    plain, late = make(None), make([{**ON[0], "start": 0.5}])
    assert (late != plain).any() and (make(None) == plain).all()


def test_a_model_without_attn1_says_so(host, lines):
    """A transformer that is not in the table: by name, once a generation however many passes it has."""

    class MMDiT(nn.Module):
        def forward(self, x, t, context=None, transformer_options=None):
            return x * 0.1

    host.shared.sd_model, host.forge = _Loaded(diffusion_model=MMDiT()), True
    plain, _ = host.generate(enable_hr=True)
    for _ in range(2):
        lines.clear()
        found, p = host.generate(ON, enable_hr=True)
        assert (plain[0] == found[0]).all() and not p.extra_generation_params
        named = "_Loaded (MMDiT) is not served in this program. ToMe merges models with a U-Net here"
        assert [named in text for text in p.comments] == [True] and sum(named in line for line in lines) == 1


@pytest.mark.parametrize("how", ["reForge's switch", "Forge Neo's extension"])
def test_a_compiled_model_is_left_alone(forge_host, lines, how):
    """Its graph would hold the patches of the call in which it was made, or be made anew for each call."""
    model = forge_host.shared.sd_model.original.unet.model
    plain, _ = forge_host.generate(enable_hr=True)
    if how == "reForge's switch":
        model.diffusion_model = torch.compile(model.diffusion_model, backend="eager")
    else:
        model._torch_compile_config = ("guard_filter_fn",)
    for _ in range(2):
        lines.clear()
        with torch.compiler.set_stance("force_eager"):  # a compiled model, without the minutes
            found, p = forge_host.generate(ON, enable_hr=True)
        assert (plain[0] == found[0]).all() and not p.extra_generation_params
        assert [text.startswith("ToMe: the model runs under torch.compile") for text in p.comments] == [True]
        assert sum("under torch.compile" in line for line in lines) == 1


def test_built_in_token_merging_goes_first(forge_host):
    plain, _ = forge_host.generate()
    found, p = forge_host.generate(ON, token_merging_ratio=0.4)
    assert (plain[0] == found[0]).all() and any("built-in" in text for text in p.comments)


# --- layers that another extension has replaced, attentions of other kinds --------------------------------------------


@pytest.fixture
def lines(tome, monkeypatch):
    """What the log gets."""
    found = []
    monkeypatch.setattr(tome.notes.logger, "info", lambda text, *args: found.append(text % args if args else text))
    return found


def _blocks(host):
    return host.shared.sd_model.original.unet.model.diffusion_model.blocks


@pytest.mark.parametrize("method", ["merge", "merge_keys", "prune"])
@pytest.mark.parametrize(
    ("name", "option", "word"),
    [("attn2", "cross_attention", "cross-attention"), ("ff", "mlp", "feed-forward layer")],
)
def test_a_layer_that_another_extension_replaced_sees_all_tokens(forge_host, lines, name, option, word, method):
    """Regional Prompter's kind goes by the number of tokens. A line each generation."""
    plain, seen = forge_host.generate([{**ON[0], "method": method}])[0], set()
    whole = forge_host.generate([{**ON[0], "method": method, option: True}])[0]
    assert (whole[0] != plain[0]).any()
    for block in _blocks(forge_host):
        layer = getattr(block, name)

        def forward(x, *args, layer=layer, **kwargs):
            seen.add(x.shape[1])
            return type(layer).forward(layer, x, *args, **kwargs)

        layer.forward = forward
    for _ in range(2):
        lines.clear()
        found = forge_host.generate([{**ON[0], "method": method, option: True}])[0]
        assert (found[0] == plain[0]).all()
        assert sum(line.endswith(f"ToMe skips a {word} that another node or extension replaces") for line in lines) == 1
    assert seen == {256, 64}


@pytest.mark.parametrize("own_token", [True, False])
def test_a_replaced_self_attention_is_left_alone(forge_host, lines, own_token):
    plain, _ = forge_host.generate()
    for block in _blocks(forge_host):
        block.attn1.forward = lambda x, *args, layer=block.attn1, **kwargs: type(layer).forward(
            layer, x, *args, **kwargs
        )
    found, p = forge_host.generate([{**ON[0], "own_token": own_token}])
    assert (found[0] == plain[0]).all() and not p.extra_generation_params
    assert sum(LEFT in line for line in lines) == 2  # where it is met, and in the report
    for block in _blocks(forge_host):
        block.attn1.forward = types.MethodType(type(block.attn1).forward, block.attn1)  # put back, not taken out
    assert (forge_host.generate([{**ON[0], "own_token": own_token}])[0][0] != plain[0]).any()


def test_what_the_right_layers_get_beside_a_replaced_one(forge_host):
    """Of two blocks, one has a replaced cross-attention: the other block's is merged."""
    sizes = []
    for place, block in enumerate(_blocks(forge_host)):
        layer = block.attn2
        if place == 1:
            layer.forward = lambda x, *args, layer=layer, **kwargs: type(layer).forward(layer, x, *args, **kwargs)
        layer.to_q.register_forward_pre_hook(lambda m, args, place=place: sizes.append((place, args[0].shape[1])))
    forge_host.generate([{**ON[0], "method": "merge", "cross_attention": True}])
    assert set(sizes) == {(0, 128), (1, 64)}


@pytest.mark.parametrize("part", ["attn2", "ff"])
def test_another_layers_forward_is_a_replacement(forge_host, tome, part):
    """A method bound to another module, as a copied layer leaves it."""
    layers = [getattr(block, part) for block in _blocks(forge_host)]
    layers[0].forward = layers[1].forward
    assert tome.block.is_taken(layers[0]) and not tome.block.is_taken(layers[1])


def test_an_attention_of_few_head_sizes_gets_no_weights(forge_host, monkeypatch, lines):
    """SageAttention 1 raises where a head has neither 64 nor 96 nor 128 channels."""

    def sage(self, x, context=None, value=None, mask=None, transformer_options=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        assert q.shape[-1] == 8, "headdim should be 8"
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return self.to_out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    monkeypatch.setattr(_Attention, "forward", sage)
    args = [{**ON[0], "method": "merge"}]
    unweighted, _ = forge_host.generate([{**args[0], "proportional": False}])
    for _ in range(2):
        lines.clear()
        found, _ = forge_host.generate(args)
        assert (found[0] == unweighted[0]).all()
        assert sum("takes no weights of keys" in line for line in lines) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        MemoryError(),
    ],
)
def test_a_failure_for_want_of_memory_says_nothing_of_an_attention(tome, monkeypatch, error):
    block = _Block(32, 4)

    def full(self, x, *args, **kwargs):
        raise error

    monkeypatch.setattr(_Attention, "forward", full)
    with pytest.raises(type(error)):
        tome.forge.forge_unet.takes_wider(block.attn1, 4, torch.zeros(1, 6, 32))


# --- other extensions' patches of the cross-attention -----------------------------------------------------------------


def _options(host):
    return host.shared.sd_model.original.unet.model_options["transformer_options"]


@pytest.mark.parametrize("method", ["merge", "prune"])
def test_a_cross_attention_that_a_patch_replaces_sees_all_tokens(forge_host, lines, method):
    """Forge's IP-Adapter takes the place of attn2."""
    seen = set()

    def other(q, k, v, extra):
        seen.add(q.shape[1])
        return q

    _options(forge_host)["patches_replace"] = {"attn2": {("input", 0): other, ("input", 1): other}}
    plain, _ = forge_host.generate([{**ON[0], "method": method}])
    lines.clear()
    found, _ = forge_host.generate([{**ON[0], "method": method, "cross_attention": True}])
    assert (found[0] == plain[0]).all() and seen == {256, 64}
    assert len(lines) == 2 and "cross-attention" in lines[0], lines


@pytest.mark.parametrize("method", ["merge", "prune"])
def test_a_cross_attention_with_more_rows_is_left_alone(forge_host, lines, method):
    """Forge Couple gives each region a row."""

    def couple(q, k, v, extra):
        return tuple(torch.cat([x, x]) for x in (q, k, v))

    _options(forge_host)["patches"] = {
        "attn2_patch": [couple], "attn2_output_patch": [lambda out, extra: out.chunk(2)[0]],
    }  # fmt: skip
    plain, _ = forge_host.generate([{**ON[0], "method": method}])
    lines.clear()
    found, _ = forge_host.generate([{**ON[0], "method": method, "cross_attention": True}])
    assert (found[0] == plain[0]).all()
    assert len(lines) == 2 and "cross-attention" in lines[0], lines
