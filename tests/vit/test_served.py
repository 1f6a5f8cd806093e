"""Which of transformers' vision models apply_patch serves: those of a list, rightly; all others are refused by name."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
import warnings
from pathlib import Path

import pytest
import torch

import shared_tome.vit as vit
from shared_tome.vit import towers

transformers = pytest.importorskip("transformers", reason="transformers is not installed, see requirements/test.txt")

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 40,
    "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 12, "projection_size": 32, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 49,
}  # fmt: skip
PROJECTED = {**VISION, "projection_dim": 16}
BOTH = {"vision_config": PROJECTED, "text_config": TEXT, "projection_dim": 16}
QFORMER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60,
    "encoder_hidden_size": 32,
}  # fmt: skip
LANGUAGE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 49,
}  # fmt: skip
# Models that are served, with what makes a small one.
SERVED = {
    "AltCLIPVisionModel": PROJECTED,
    "Blip2VisionModel": VISION,
    "Blip2VisionModelWithProjection": {
        "vision_config": VISION, "qformer_config": QFORMER, "image_text_hidden_size": 16,
    },
    "CLIPSegVisionModel": PROJECTED,
    "CLIPVisionModel": PROJECTED,
    "CLIPVisionModelWithProjection": PROJECTED,
    "ChineseCLIPVisionModel": PROJECTED,
    "DeiTForImageClassification": VISION,
    "DeiTForImageClassificationWithTeacher": VISION,
    "DeiTForMaskedImageModeling": {**VISION, "encoder_stride": 8},
    "DeiTModel": VISION,
    "Dinov2ForImageClassification": VISION,
    "Dinov2Model": VISION,
    "Dinov2WithRegistersForImageClassification": VISION,
    "Dinov2WithRegistersModel": VISION,
    "InstructBlipVisionModel": VISION,
    "JanusVisionModel": VISION,
    "MetaClip2VisionModel": PROJECTED,
    "MetaClip2VisionModelWithProjection": PROJECTED,
    "OwlViTVisionModel": PROJECTED,
    "OwlViTVisionTransformer": PROJECTED,
    "Owlv2VisionModel": PROJECTED,
    "Owlv2VisionTransformer": PROJECTED,
    "SiglipVisionModel": VISION,
    "ViTForImageClassification": VISION,
    "ViTForMaskedImageModeling": {**VISION, "encoder_stride": 8},
    "ViTMSNForImageClassification": VISION,
    "ViTMSNModel": VISION,
    "ViTModel": VISION,
}  # fmt: skip
# Served, and looked at in test_families.py: keys that turn by their place, masked patches.
ELSEWHERE = {"DINOv3ViTModel", "Siglip2VisionModel"}
# Models of several parts around a served tower.
AROUND = {
    "CLIPForImageClassification": BOTH,
    "Cohere2VisionModel": {
        "vision_config": {**VISION, "image_size": 48, "model_type": "siglip_vision_model"},
        "text_config": {**LANGUAGE, "model_type": "cohere2"}, "downsample_factor": 2, "alignment_intermediate_size": 32,
    },
    "MetaClip2ForImageClassification": BOTH,
    "OwlViTForObjectDetection": {**BOTH, "projection_dim": 32},
    "Owlv2ForObjectDetection": {**BOTH, "projection_dim": 32},
    "SiglipForImageClassification": BOTH,
}  # fmt: skip
# As those, and they read the tokens between the blocks too.
READERS = {
    "CLIPSegForImageSegmentation": {
        **BOTH, "extract_layers": [0, 1, 2], "reduce_dim": 16, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    },
    "LlavaModel": {
        "vision_config": {**PROJECTED, "model_type": "clip_vision_model"}, "image_token_index": 48,
        "text_config": {**LANGUAGE, "model_type": "llama"},
    },
}  # fmt: skip
OF_PARTS = {  # whose names say vision
    "Cohere2VisionForConditionalGeneration", "Cohere2VisionModel", "OwlViTForObjectDetection", "OwlViTModel",
    "VisionEncoderDecoderModel", "VisionTextDualEncoderModel",
}  # fmt: skip
# Not to be made from the default configuration: models of several parts, and one that needs timm.
UNMADE = {
    "AyaVisionForConditionalGeneration", "AyaVisionModel", "EdgeTamVisionModel",
    "Granite4VisionForConditionalGeneration", "Granite4VisionModel", "Deimv2DINOv3ConvEncoder",
}  # fmt: skip
# What names of models say that is looked at.
NAMED = "Vision|ViT|DeiT|Dino|DINO"
LENGTHS = ("num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers")


@functools.cache
def classes():
    """The models of the transformers that is installed whose names say vision, by name."""
    found = {}
    for file in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        if not re.search(rf"^class \w*({NAMED})", file.read_text(encoding="utf-8"), re.MULTILINE):
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for name, cls in vars(module).items():
            is_model = inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)
            is_named = cls.__module__ == module.__name__ and re.search(NAMED, name) if is_model else False
            if is_named and cls.config_class is not None:
                if not name.endswith("PreTrainedModel"):
                    found[name] = cls
    return found


def shorten(config):
    """Two blocks in each part of a model."""
    for name, value in list(vars(config).items()):
        if name in LENGTHS and isinstance(value, int):
            setattr(config, name, min(value, 2))
        elif isinstance(value, transformers.PretrainedConfig):
            shorten(value)
    return config


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_every_vision_model_of_transformers_is_served_or_refused_by_name():
    """A new name in `served` is of a class that looks like a served one: see whether its outputs are right."""
    served, unmade, readers, refused = set(), set(), set(), 0
    for name, cls in classes().items():
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = cls(shorten(cls.config_class()))
        except (ValueError, TypeError, ImportError, AttributeError):
            unmade.add(name)
            continue
        before = hooks(model)
        try:
            vit.apply_patch(model, 4)
        except ValueError as error:
            assert hooks(model) == before
            if "reads the tokens between the blocks" in str(error):
                readers.add(name)
                continue
            assert str(error).startswith(f"ToMe does not know {name} as a vision transformer. It serves timm's")
            refused += 1
        else:
            served.add(name)
    assert served == set(SERVED) | ELSEWHERE | OF_PARTS
    assert readers == {"DINOv3ViTBackbone", "Dinov2Backbone", "Dinov2WithRegistersBackbone"}
    assert unmade <= UNMADE and refused > len(served)


def test_the_refusal_and_the_page_name_every_tower():
    named = towers.SERVED.partition("towers of ")[2].partition(", and ComfyUI's")[0]
    layers = (name for name in towers._LAYERS if "." not in name)
    families = {re.sub("(Vision)?(Encoder)?Layer$", "", name).lower() for name in layers}
    assert {re.sub("[ -]", "", name).lower() for name in re.split(", | and ", named)} == families
    page = (Path(__file__).parents[2] / "docs" / "vit.md").read_text(encoding="utf-8")
    assert f"transformers' vision towers of {named} (" in " ".join(page.split())


def make(name):
    """A small model in float64. Its patches have no places, so those of one look stay equal in every block."""
    cls = classes()[name] if name in SERVED else getattr(transformers, name)
    config = cls.config_class(**(SERVED | AROUND | READERS)[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, placed = cls(config).double().eval(), 0
        for parameter, weight in model.named_parameters():
            if "position_embedding" in parameter and "text" not in parameter:
                weight.data.zero_()
                placed += 1
            elif weight.dim() > 1:
                weight.data.normal_(std=weight[0].numel() ** -0.5)
    assert placed == 1
    return model


def pictures(looks):
    """Of patches of 8x8 pixels, [2, 3, 8 * H, 8 * W] float64. looks: [2, H, W], a number for each look."""
    each = torch.randn(int(looks.max()) + 1, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return each[looks].permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def looks_of(model):
    """[2, H, W], H and W the patches of the model's pictures: three looks in stripes, which alternating sets share."""
    side = math.isqrt(next(m for m in model.modules() if hasattr(m, "num_patches")).num_patches)
    return (torch.arange(side * side).reshape(side, side) // 6 % 3).expand(2, -1, -1)


@torch.no_grad()
def outputs(model):
    """All tensors that a model makes of the pictures."""
    given = {"pixel_values": pictures(looks_of(model))}
    if hasattr(model, "language_model"):
        return tensors(model.get_image_features(**given))
    if "input_ids" in inspect.signature(model.forward).parameters:
        given["input_ids"] = torch.tensor([[2, 3, 4, 5, 6, 49], [7, 8, 9, 10, 11, 49]])
    return tensors(model(**given))


def tensors(out, name=""):
    """All in a model's output, by name."""
    if isinstance(out, torch.Tensor):
        return {name: out}
    items = out.items() if isinstance(out, dict) else enumerate(out or ())
    return {key: value for part, inner in items for key, value in tensors(inner, f"{name}.{part}").items()}


def apart(some, others):
    """The largest relative difference of two models' outputs."""
    assert some.keys() == others.keys() and some
    return max(float((some[name] - others[name]).abs().max() / others[name].abs().max()) for name in some)


RS = [0, 6, 4, 3]


@pytest.mark.parametrize("name", SERVED | AROUND)
def test_equal_patches_merge_without_a_trace(name):
    """Where the tokens that merge are equal and keys have their weights, the outputs are the unmerged ones."""
    model = make(name)
    before, looks = outputs(model), looks_of(model).flatten(1)
    for proportional in (True, False):
        vit.apply_patch(model, RS, proportional=proportional, trace=True)
        after, trace = outputs(model), vit.trace(model)
        prefix = trace.sources.shape[1] - looks.shape[1]
        assert [trace.counts[0] - count for count in trace.counts] == [0, 6, 10, 13] and prefix in (0, 1, 2, 5)
        for row, source in zip(looks, trace.sources[:, prefix:], strict=True):
            assert all(len(set(row[source == one].tolist())) == 1 for one in source.unique())
        assert apart(after, before) < 1e-6 if proportional else apart(after, before) > 1e-3
    vit.remove_patch(model)
    assert apart(outputs(model), before) == 0.0


@pytest.mark.parametrize("name", READERS)
def test_models_that_read_the_tokens_between_the_blocks(name):
    model = make(name)
    for restore in ("last", "none"):
        with pytest.raises(ValueError, match=f"{name} reads the tokens between the blocks.*choose restore='all', got"):
            vit.apply_patch(model, RS, restore=restore)
        assert hooks(model) == 0
    before = outputs(model)
    vit.apply_patch(model, RS, restore="all")
    assert apart(outputs(model), before) < 1e-6
    vit.apply_patch(model, RS, restore="all", proportional=False)
    assert apart(outputs(model), before) > 1e-3


def test_a_reader_of_the_last_block_is_served():
    model = make("LlavaModel")
    model.config.vision_feature_layer = -1
    before = outputs(model)
    vit.apply_patch(model, RS)
    assert apart(outputs(model), before) < 1e-6
