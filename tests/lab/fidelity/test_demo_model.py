"""The demo model in a real ComfyUI: the same U-Net, the same pictures."""

from __future__ import annotations

import json
from pathlib import Path

MODEL = Path(__file__).resolve().parents[3] / "demo" / "model.safetensors"


def test_our_unet_is_comfyuis(in_comfyui: dict) -> None:
    """Strictly loaded weights, the same output to 1e-4 of its range in float32."""
    assert max(in_comfyui["unet"]) < 1e-4


def test_hypertile_in_comfyui_cuts_the_queries_alone(in_comfyui: dict) -> None:
    """So the lab measures it both ways (methods). Should ComfyUI's node cut the keys too, docs/quality.md says so."""
    alike, whole, tiles = in_comfyui["tiles"]
    assert alike < 1e-5 and whole > 1e-4 and tiles > 1e-4


def test_ksampler_paints_what_the_trainer_paints(in_comfyui: dict) -> None:
    found = in_comfyui["sampled"]
    assert max(found["difference"]) < 1e-3
    assert found["sigmas"]
    assert found["blocks"] == 12
    assert found["picture"][:4] == [1, 32, 32, 3]
    assert 0 <= found["picture"][4] < found["picture"][5] <= 1
    assert found["means"][0] != found["means"][1]


def test_an_ordinary_empty_latent_is_taken(in_comfyui: dict) -> None:
    """ComfyUI gives it 3 channels and pixels for eighths."""
    assert in_comfyui["sampled"]["plain_latent"] == [1, 3, 32, 32]


def test_node(in_comfyui: dict) -> None:
    told = in_comfyui["told"]
    assert told["id"] == "ToMeDemoModel"
    assert told["inputs"] == ["subject", "size", "batch_size"]
    assert told["outputs"] == ["MODEL", "CONDITIONING", "CONDITIONING", "VAE", "LATENT"]
    assert "unicorn" in told["refused"][0] and told["names"][0] in told["refused"][0]
    assert "8" in told["refused"][1] and "256" in told["refused"][1]


def test_model_file() -> None:
    """Small enough for a repository, with all that is needed to run it."""
    from lab.models.data import CLASS_NAMES
    from lab.models.model import load_model
    from lab.models.samplers import cosine_sigmas

    assert Path(MODEL).stat().st_size < 16_000_000
    model, sigmas, metadata = load_model(MODEL)
    assert json.loads(metadata["classes"]) == list(CLASS_NAMES)
    assert model.class_tokens.shape == (len(CLASS_NAMES) + 1, 4, model.network.config.context_dim)
    assert (sigmas / cosine_sigmas() - 1).abs().max() < 1e-5
    assert all(p.isfinite().all() for p in model.parameters())
