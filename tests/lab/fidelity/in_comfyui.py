"""Runs our U-Net and the demo model beside ComfyUI's own classes, JSON on stdout. Needs COMFYUI_DIR."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

REPO = Path(__file__).resolve().parents[3]
PACK = f"{REPO}/demo".replace(".", "_x_")  # ComfyUI names a pack by its path: only relative imports hold


def start_comfyui() -> None:
    sys.path.insert(0, str(REPO))
    from installer import inprocess

    inprocess.start(Path(os.environ["COMFYUI_DIR"]), ["--cpu"])


def load_demo() -> ModuleType:
    """demo/nodes.py, its package loaded from the file as ComfyUI loads a pack."""
    folder = REPO / "demo"
    spec = spec_from_file_location(PACK, folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    return importlib.import_module(f"{PACK}.nodes")


def unet_differences(demo: ModuleType) -> list[float]:
    """Largest difference between our U-Net and ComfyUI's, over sizes, odd grids and sparse attention."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from lab.models.unet import UNet, UNetConfig

    uneven = UNetConfig(
        model_channels=32, channel_mult=(1, 2, 3), num_res_blocks=(1, 2, 1), transformer_depth=(0, 2, 1), context_dim=48
    )
    found = []
    for config, (height, width) in ((UNetConfig(), (16, 24)), (uneven, (18, 25))):
        generator = torch.Generator().manual_seed(0)
        ours = UNet(config).eval()
        for parameter in ours.parameters():  # the zeros of a fresh network would hide whole branches
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.06
        theirs = UNetModel(**demo.host_unet_config(asdict(config)), dtype=torch.float32).eval()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        x = torch.randn(2, 3, height, width, generator=generator)
        context = torch.randn(2, 4, config.context_dim, generator=generator)
        times = torch.tensor([3.0, 977.0])
        expected = ours(x, times, context)
        error = (theirs(x, times, context) - expected).abs().max() / expected.abs().max()
        found.append(error.item())
    return found


def tile_differences(demo: ModuleType) -> list[float]:
    """Largest difference between the lab's HyperTile and ComfyUI's node of 4 x 4 tiles, then what tiles change, and how
    far from them those are whose keys are cut too."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy_extras.nodes_hypertile import HyperTile

    from lab.fidelity.hooks import merged
    from lab.fidelity.methods import rivals
    from lab.models.unet import UNet, UNetConfig

    patches = {}
    model = SimpleNamespace(
        clone=lambda: model,
        set_model_attn1_patch=lambda patch: patches.update(attn1_patch=[patch]),
        set_model_attn1_output_patch=lambda patch: patches.update(attn1_output_patch=[patch]),
    )
    HyperTile.execute(model, 64, 2, 0, False)
    config = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=(1, 1), transformer_depth=(1, 1))
    generator = torch.Generator().manual_seed(0)
    ours = UNet(config).eval()
    for parameter in ours.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.06
    theirs = UNetModel(**demo.host_unet_config(asdict(config)), dtype=torch.float32).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 3, 32, 32, generator=generator)
    context, times = torch.randn(1, 4, config.context_dim, generator=generator), torch.tensor([500.0])
    expected = theirs(x, times, context, transformer_options={"patches": patches})

    def made(name: str) -> torch.Tensor:
        with merged(ours, rivals(30, False)[name]) as run:
            run.begin((32, 32), x.device, torch.zeros(1, dtype=torch.int64), 0, 30)
            return ours(x, times, context)

    outs = made("HyperTile 4x4 in ComfyUI"), ours(x, times, context), made("HyperTile 4x4")
    return [((out - expected).abs().max() / expected.abs().max()).item() for out in outs]


def sampled(nodes: ModuleType) -> dict:
    """The node's outputs through the real KSampler, against the trainer's own sampler from the same noise."""
    import comfy.sample
    import comfy.samplers
    import nodes as comfy_nodes
    from comfy.ldm.modules.attention import BasicTransformerBlock

    from lab.models.model import load_model
    from lab.models.samplers import sample

    demo = nodes.demo
    names = demo.class_names()
    own, sigmas, _ = load_model(demo.MODEL_FILE)
    found = {"difference": [], "means": []}
    for name in names[:2]:
        model, positive, negative, vae, latent = nodes.ToMeDemoModel.execute(name, 32, 1).args
        arguments = (7, 4, 3.0, "euler", "simple", positive, negative, latent, 1.0)
        out = comfy_nodes.KSampler().sample(model, *arguments)[0]["samples"]
        noise = comfy.sample.prepare_noise(latent["samples"], 7)
        context = own.context(torch.tensor([names.index(name)]))
        expected = sample(own.network, noise, context, own.class_tokens[-1:], sigmas, steps=4)
        picture = vae.decode(out)
        found["difference"].append((out - expected).abs().max().item())
        found["means"].append(picture.mean().item())
        found["picture"] = [*picture.shape, picture.min().item(), picture.max().item()]
    blocks = model.model.diffusion_model.modules()
    found["blocks"] = sum(isinstance(block, BasicTransformerBlock) for block in blocks)
    found["sigmas"] = model.get_model_object("model_sampling").sigmas.equal(sigmas)
    plain = comfy_nodes.EmptyLatentImage().generate(32, 32)[0]
    arguments = (7, 1, 1.0, "euler", "simple", positive, negative, plain, 1.0)
    found["plain_latent"] = list(comfy_nodes.KSampler().sample(model, *arguments)[0]["samples"].shape)
    return found


def told(nodes: ModuleType) -> dict:
    """The schema, and the refusals."""
    schema = nodes.ToMeDemoModel.GET_SCHEMA()
    refused = []
    for call in (lambda: nodes.demo.conditioning("unicorn"), lambda: nodes.demo.empty_latent(8)):
        try:
            call()
        except ValueError as error:
            refused.append(str(error))
    return {
        "id": schema.node_id,
        "inputs": [i.id for i in schema.inputs],
        "outputs": [o.io_type for o in schema.outputs],
        "names": nodes.demo.class_names(),
        "refused": refused,
    }


def main() -> None:
    start_comfyui()
    with torch.inference_mode():
        nodes = load_demo()
        found = {
            "unet": unet_differences(nodes.demo),
            "tiles": tile_differences(nodes.demo),
            "sampled": sampled(nodes),
            "told": told(nodes),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
