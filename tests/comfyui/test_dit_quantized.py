"""Models with quantized weights: fp8, ComfyUI's own formats of fp8 and int8, and packed weights as ComfyUI-GGUF has.

ToMe sees queries, keys and values, which are computed as ever, and no weight. So each picture is that of a model
whose weights are what the quantized ones stand for.
"""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch

from . import dit_host, host
from .test_dit_models import check_float64

EXACT = ("stored as fp8", "float8_e4m3fn", "nvfp4", "mxfp8", "packed")
ROUNDING = ("int8_tensorwise", "convrot_w4a4")  # inputs too, in integers


class Packed(torch.Tensor):
    """As ComfyUI-GGUF's: bytes, of which `shape` tells the shape that they stand for."""

    def __new__(cls, data, stands_for):
        packed = data.as_subclass(cls)
        packed.stands_for = stands_for
        return packed

    @property
    def shape(self):
        return self.stands_for

    def to(self, *args, **kwargs):
        return self

    def detach(self):
        return self


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 8 bits with a scale of 4 bytes behind each -> (bytes, what they stand for)."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scale).round().to(torch.int8)
    return torch.cat((numbers.view(torch.uint8), scale.contiguous().view(torch.uint8)), dim=1), numbers * scale


def packing_ops():
    """Operations that unpack a linear layer's weight each time, as ComfyUI-GGUF's."""
    import comfy.ops

    class Ops(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def forward(self, x, *args, **kwargs):
                if not isinstance(self.weight, Packed):
                    return super().forward(x, *args, **kwargs)
                data = self.weight.as_subclass(torch.Tensor)
                numbers, scale = data[:, :-4].view(torch.int8), data[:, -4:].contiguous().view(torch.float32)
                return torch.nn.functional.linear(x, numbers * scale, self.bias)

    return Ops


def small(name: str, kind: str):
    wide = {"hidden_size": 256, "num_heads": 8} if (name, kind) == ("flux", "convrot_w4a4") else {}
    return host.short_unet(manual_cast=torch.float32) if name == "unet" else dit_host.small(name, **wide)


def quantized(name: str, kind: str) -> tuple[object, object]:
    """Two ModelPatchers: with quantized linear layers, and with what these stand for."""
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models_base as base
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    ops = {"stored as fp8": comfy.ops.manual_cast, "packed": packing_ops()}.get(kind)
    config = {"mixed_ops": True} if ops is None else None
    plain = small(name, kind)
    with (
        mock.patch.object(base.BASE, "custom_operations", ops),
        mock.patch.object(base.BASE, "quant_config", config),
        mock.patch.object(base.BASE, "manual_cast_dtype", torch.float32),
    ):
        made = small(name, kind)
    state, meant = plain.model.diffusion_model.state_dict(), {}
    whole = 256 if kind == "convrot_w4a4" else 1  # channels that it takes together
    modules = plain.model.diffusion_model.named_modules()
    linear = [key for key, one in modules if isinstance(one, torch.nn.Linear) and one.in_features % whole == 0]
    network = made.model.diffusion_model
    for key in linear:
        weight = state[f"{key}.weight"].float()
        if kind == "stored as fp8":
            state[f"{key}.weight"] = weight.to(torch.float8_e4m3fn)
            meant[key] = state[f"{key}.weight"].float()
        elif kind == "packed":
            data, meant[key] = pack(weight)
            network.get_submodule(key).weight = torch.nn.Parameter(Packed(data, weight.shape), requires_grad=False)
            state[f"{key}.weight"] = weight  # is not loaded
        else:
            scale = {} if kind == "convrot_w4a4" else {"scale": "recalculate"}
            tensor = QuantizedTensor.from_float(weight, QUANT_ALGOS[kind]["comfy_tensor_layout"], **scale)
            meant[key] = tensor.dequantize().float()
            state.update({f"{key}{end}": value for end, value in tensor.state_dict(".weight").items()})
            config = json.dumps({"format": kind, "full_precision_matrix_mult": True}).encode()
            state[f"{key}.comfy_quant"] = torch.frombuffer(bytearray(config), dtype=torch.uint8)
    if kind == "packed":
        state = {key: value for key, value in state.items() if key.removesuffix(".weight") not in linear}
    if kind == "stored as fp8":
        for key in linear:
            network.get_submodule(key).to(torch.float8_e4m3fn)
            meant[key + " bias"] = None
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(key.removesuffix(".weight") in linear for key in missing)
    for key in linear:
        module = plain.model.diffusion_model.get_submodule(key)
        module.weight.data.copy_(meant[key])
        if module.bias is not None and kind == "stored as fp8":
            module.bias.data.copy_(network.get_submodule(key).bias.float())
    return made, plain


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("method", ["sample", "merge"])
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", ["flux", "wan", "unet"])
def test_the_picture_is_that_of_the_weights_meant(tome, comfy_nodes, name, kind, method):
    made, meant = quantized(name, kind)
    sample = host.sample if name == "unet" else lambda model: dit_host.sample(model, name)
    plain, merged = sample(made), sample(tome(made, method=method, ratio=0.75))
    assert distance(plain, sample(meant)) < 1e-4
    assert distance(merged, sample(tome(meant, method=method, ratio=0.75))) < 1e-4
    assert distance(merged, plain) > 1e-3
    assert torch.equal(sample(made), plain)


@pytest.mark.parametrize(("name", "kind"), [("flux", ROUNDING[0]), ("wan", ROUNDING[0]), ("flux", ROUNDING[1])])
def test_layers_that_round_their_inputs_too(tome, comfy_nodes, merged_layers, name, kind):
    """What differs by a rounding becomes another number, so the attentions alone are compared."""
    made, meant = quantized(name, kind)
    plain, merged = (dit_host.call(model, name) for model in (made, tome(made, ratio=0.75, own_token=False)))
    assert not torch.equal(plain, merged) and merged.isfinite().all()
    check_float64(merged_layers, dit_host.SMALL[name])
    assert 0 < distance(plain, dit_host.call(meant, name)) < (0.2 if kind == ROUNDING[0] else 0.5)
    assert torch.equal(dit_host.call(made, name), plain)


def test_a_measurement_names_the_format(comfy_nodes):
    """What a step takes depends on it."""
    about = host.pack_module("whole_step").about_model
    said = {kind: about(quantized("unet", kind)[0].model) for kind in (*EXACT, *ROUNDING)}
    assert len(set(said.values())) == len(said)
    assert "Packed" in said["packed"] and "int8_tensorwise" in said["int8_tensorwise"]
