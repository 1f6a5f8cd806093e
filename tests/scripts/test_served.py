"""Which classes apply_patch serves: those on its list, by name; all others are refused, however alike they look."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import shared_tome
from shared_tome.hooks.served import served_as
from shared_tome.scripts import UNETS
from shared_tome.scripts.rows import REFUSED as REASONS
from shared_tome.scripts.rows import ROWS

from . import models

diffusers = models.diffusers

# Looked at in diffusers 0.42.1: video, sound, linear attention, other blocks, no denoiser at all, or on no page.
REFUSED = """
AceStepTransformer1DModel AllegroTransformer3DModel AnyFlowFARTransformer3DModel AnyFlowTransformer3DModel
AudioLDM2ProjectionModel AudioLDM2UNet2DConditionModel BriaFibo2Transformer2DModel
BriaFiboTransformer2DModel BriaTransformer2DModel ChronoEditTransformer3DModel
CogView3PlusTransformer2DModel CogView4Transformer2DModel ConsisIDTransformer3DModel ControlNetModel
ControlNetUnionModel ControlNetXSAdapter Cosmos3OmniTransformer CosmosControlNetModel
CosmosTransformer3DModel DiTTransformer2DModel DreamLiteTransformer2DModel EasyAnimateTransformer3DModel
ErnieImageTransformer2DModel Flux2Transformer2DModel Flux3Transformer2DModel FluxControlNetModel
FluxMultiControlNetModel GlmImageTransformer2DModel HeliosTransformer3DModel HiDreamImageTransformer2DModel
HunyuanDiT2DControlNetModel HunyuanDiT2DMultiControlNetModel HunyuanImageTransformer2DModel
HunyuanVideo15Transformer3DModel HunyuanVideoFramepackTransformer3DModel I2VGenXLUNet
Ideogram4Transformer2DModel JoyImageEditPlusTransformer3DModel JoyImageEditTransformer3DModel Kandinsky3UNet
Kandinsky5Transformer3DModel Kandinsky6SRTransformer3DModel Kandinsky6Transformer3DModel
Krea2Transformer2DModel LTX2VideoDiffusionDecoderModel LTX2VideoTransformer3DModel LatteTransformer3DModel
LongCatAudioDiTTransformer LongCatImageTransformer2DModel Lumina2Transformer2DModel LuminaNextDiT2DModel
MiniMaxH3Transformer3DModel MiniMaxMusic3RVQDepthDecoder MiniMaxMusic3Transformer1DModel
MochiTransformer3DModel MotifVideoTransformer3DModel MotionAdapter MultiControlNetModel
MultiControlNetUnionModel NucleusMoEImageTransformer2DModel OmniGenTransformer2DModel
OvisImageTransformer2DModel PRXTransformer2DModel PriorTransformer QwenImage21Transformer2DModel
QwenImageControlNetModel QwenImageMultiControlNetModel RFD4ProteinaTransformer SD3ControlNetModel
SD3MultiControlNetModel SanaControlNetModel SanaTransformer2DModel SanaVideoTransformer3DModel
SanaWMLTX2RefinerTransformer3DModel SanaWMTransformer3DModel SkyReelsV2Transformer3DModel
SparseControlNetModel StableAudio3DiTModel StableAudioDiTModel StableAudioProjectionModel StableCascadeUNet
T5FilmDecoder Transformer2DModel TransformerTemporalModel UNet1DModel UNet2DModel UNet3DConditionModel
UNetMotionModel UNetSpatioTemporalConditionModel UVit2DModel UniDiffuserModel VQModel
WanAnimate2Transformer3DModel WanAnimateTransformer3DModel WanVACETransformer3DModel ZImageControlNetModel
""".split()


def classes():
    """The denoisers, their parts and control networks of the diffusers that is installed, by name."""
    found = {}
    for kind in ("transformers", "unets", "controlnets"):
        package = importlib.import_module(f"diffusers.models.{kind}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for cls in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin) and cls.__module__ == module.name:
                    found[cls.__name__] = cls
    for name in dir(diffusers):  # some stand beside their pipelines
        if name.endswith(("Model", "UNet", "Transformer", "Prior")):
            cls = getattr(diffusers, name)
            if inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin):
                found[name] = cls
    return found


def alike(cls):
    """An object of the class that has nothing but a transformer block as diffusers' U-Nets have it."""
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    block = diffusers.models.attention.BasicTransformerBlock(16, 2, 8, cross_attention_dim=16)
    model.transformer_blocks = nn.ModuleList([block])
    return model


def test_every_class_of_diffusers_is_served_or_refused():
    """A class that is missing here is new in diffusers: see whether it is served, and put it on one of the lists."""
    served = {name for name, cls in classes().items() if served_as(alike(cls), (*UNETS, *ROWS)) is not None}
    assert served == {name for name in (*UNETS, *ROWS) if "." not in name} | {"DreamLiteUNetModel"}  # a subclass
    assert set(classes()) - served == set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_listed_is_refused_by_name(name):
    model = alike(classes()[name])
    says = f"does not serve {name}: {REASONS[name]}" if name in REASONS else f"does not know {name}"
    with pytest.raises(ValueError, match=f"{says}. It serves diffusers pipelines.*UNet2DConditionModel"):
        shared_tome.apply_patch(model)
    assert models.count_hooks(model) == 0


def test_a_pipeline_of_another_model_is_named_with_it():
    class VideoPipeline:
        unet = alike(diffusers.UNetMotionModel)

    with pytest.raises(ValueError, match="does not know VideoPipeline with UNetMotionModel"):
        shared_tome.apply_patch(VideoPipeline())


def test_a_unet_without_a_known_attention_is_refused():
    """Kandinsky 2.2's and DeepFloyd's U-Nets are of the class, too, and attend to text and image at once."""
    unet = models.seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
            down_block_types=("SimpleCrossAttnDownBlock2D",), up_block_types=("SimpleCrossAttnUpBlock2D",),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", attention_head_dim=8,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="knows none of the attention layers in UNet2DConditionModel"):
        shared_tome.apply_patch(unet)


def test_subclasses_count_as_long_as_they_keep_the_forward():
    class Named(diffusers.UNet2DConditionModel):
        pass

    class Changed(diffusers.UNet2DConditionModel):
        def forward(self, sample, *args, **kwargs):
            return super().forward(sample * 2, *args, **kwargs)

    unet = models.sd15()
    before = models.run(unet)
    unet.__class__ = Named
    shared_tome.apply_patch(unet)
    assert not torch.equal(models.run(unet), before)
    shared_tome.remove_patch(unet)
    unet.__class__ = Changed
    with pytest.raises(ValueError, match="does not know Changed"):
        shared_tome.apply_patch(unet)
    assert models.count_hooks(unet) == 0


def test_the_one_model_inside_a_wrapper_is_found():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model = model

        def forward(self, *args, **kwargs):
            return self.base_model(*args, **kwargs)

    unet = models.sd15()
    before, wrapper = models.run(unet), Wrapper(nn.ModuleList([unet]))
    shared_tome.apply_patch(wrapper)
    assert not torch.equal(models.run(unet), before)
    shared_tome.remove_patch(wrapper)
    assert torch.equal(models.run(unet), before) and models.count_hooks(wrapper) == 0
    with pytest.raises(ValueError, match="does not know Wrapper"):  # which of the two?
        shared_tome.apply_patch(Wrapper(nn.ModuleList([unet, models.sd15()])))


@torch.no_grad()
@pytest.mark.parametrize("method", ["merge", "sample"])
def test_controlnet_xs(method):
    """The U-Net that ControlNet-XS pipelines make of two runs a control network beside its own blocks."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip

    def make():
        adapter = diffusers.ControlNetXSAdapter.from_unet(unet, size_ratio=0.5)
        return diffusers.UNetControlNetXSModel.from_unet(unet, adapter)

    model = models.seeded(make)

    def run():
        x, context = models.noise(2, 4, 16, 20, seed=1), models.noise(2, 7, 16, seed=2)
        return model(x, 500, context, controlnet_cond=models.noise(2, 3, 128, 160, seed=3)).sample

    before = run()
    options = shared_tome.ToMeConfig(method=method, ratio=0.0, min_tokens=0, levels="0,1")
    shared_tome.apply_patch(model, config=options)
    assert torch.equal(run(), before)
    shared_tome.apply_patch(model, config=options.replace(ratio=0.5))
    assert not torch.equal(run(), before)
    shared_tome.remove_patch(model)
    assert torch.equal(run(), before) and models.count_hooks(model) == 0


def test_ldms_relatives():
    """The class that ControlNet's own repository derives: its forward adds the control between ldm's blocks."""
    from a1111 import models as ldm

    unet = ldm.small_model().model.diffusion_model
    plain = type(unet)

    def forward(self, x, timesteps=None, context=None, control=None):
        return plain.forward(self, x, timesteps, context)

    for module, served in (("cldm.cldm", True), ("somewhere.else", False)):
        unet.__class__ = type("ControlledUnetModel", (plain,), {"forward": forward, "__module__": module})
        if served:
            shared_tome.remove_patch(shared_tome.apply_patch(unet))
        else:
            with pytest.raises(ValueError, match="does not know ControlledUnetModel"):
                shared_tome.apply_patch(unet)


@pytest.mark.parametrize("model, name", [(None, "NoneType"), ("a path", "str")])
def test_what_is_no_model_is_named(model, name):
    with pytest.raises(ValueError, match=f"ToMe does not know {name}\\. It serves"):
        shared_tome.apply_patch(model)
