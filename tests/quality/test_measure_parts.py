"""The lab's samplers, metrics, draws and page, each against something known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from quality import methods, metrics, plot, samplers
from quality.diffusion import cosine_sigmas
from quality.rows import MAIN, results
from shared_tome import ModelCall, ToMeConfig

GRID = (8, 8)


def pictures(count: int, seed: int, size: int = 24) -> torch.Tensor:
    return torch.rand((count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 255


# -- samplers -----------------------------------------------------------------------------------------------------


def gaussian_error(name: str, steps: int) -> float:
    """Of a sampler on data N(0, 0.5^2), whose denoiser and whose flow are known in closed form."""
    spread = 0.5
    _, sigmas = samplers.step_sigmas(cosine_sigmas(), steps)
    start = torch.randn((1, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoised(x: torch.Tensor, step: int) -> torch.Tensor:
        return x * spread**2 / (spread**2 + sigmas[step] ** 2)

    found = samplers.run(samplers.SAMPLERS[name], denoised, start, sigmas, lambda: torch.zeros_like(start))
    exact = start * (1 + sigmas[0] ** 2) ** 0.5 * spread / (spread**2 + sigmas[0] ** 2) ** 0.5
    return (found - exact).abs().max().item()


def test_deterministic_samplers_follow_the_flow():
    assert gaussian_error("ddim30", 200) < 0.3 * gaussian_error("ddim30", 30)
    assert gaussian_error("dpmpp2m15", 30) < 0.5 * gaussian_error("ddim30", 30)  # of second order
    assert gaussian_error("dpmpp2m15", 200) < 0.01


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_samplers_end_at_the_only_picture_there_is(name):
    sampler = samplers.SAMPLERS[name]
    _, sigmas = samplers.step_sigmas(cosine_sigmas(), sampler.steps)
    only = torch.full((1, 3, 4, 4), 0.3)
    seen = []

    def denoised(x: torch.Tensor, step: int) -> torch.Tensor:
        seen.append((x - only).std().item() / sigmas[step])
        return only

    found = samplers.run(sampler, denoised, torch.randn(1, 3, 4, 4), sigmas, lambda: torch.randn(1, 3, 4, 4))
    assert torch.allclose(found, only) and len(seen) == sampler.steps
    assert all(0.4 < share < 1.7 for share in seen)  # at each sigma there is that much noise (48 numbers)


def test_ancestral_noise_has_the_right_variance():
    sigmas = [10.0, 2.0, 0.0]
    big = torch.randn((1, 1, 300, 300), generator=torch.Generator().manual_seed(0))
    again = torch.randn((1, 1, 300, 300), generator=torch.Generator().manual_seed(1))
    state = samplers.State(10 * big, torch.zeros_like(big), *sigmas[:2], None, 10.0, lambda: again)
    x = samplers.euler_a(state)
    assert x.std().item() == pytest.approx(2.0, rel=0.02)
    assert 0.1 < np.corrcoef(x.flatten(), big.flatten())[0, 1] < 0.3  # 0.2: most of the noise is new


# -- metrics ------------------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    a = pictures(2, 0)
    assert metrics.psnr(a, a + 2.55).tolist() == pytest.approx([40.0, 40.0])
    assert metrics.psnr(a, a).tolist() == [float("inf")] * 2


def test_clipping_comes_before_comparing():
    assert metrics.to_range(torch.tensor([-3.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0.0, 0.0, 127.5, 255.0, 255.0]


def test_ssim_is_scikit_images():
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    a = pictures(2, 0)
    b = (0.7 * a + 0.3 * pictures(2, 1)).clamp(0, 255)
    expected = [
        structural_similarity(
            x.permute(1, 2, 0).numpy(),
            y.permute(1, 2, 0).numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=2,
            data_range=255,
        )
        for x, y in zip(a, b, strict=True)
    ]
    assert metrics.ssim(a, b).tolist() == pytest.approx(expected, abs=1e-9)


def test_frechet_of_known_gaussians():
    a = torch.randn((4000, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T  # exactly standard
    assert metrics.frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    assert metrics.frechet(a, a + 2) == pytest.approx(12.0)  # three means moved by 2
    assert metrics.frechet(3 * a, a) == pytest.approx(3 * (3 - 1) ** 2)  # three deviations, 3 against 1
    gap, error = metrics.frechet_gap(a + 1, a, a, draws=20)
    assert gap == pytest.approx(3.0) and 0 < error < 0.5
    assert metrics.frechet_gap(a, a, a + 1, draws=5) == (0.0, 0.0)


def test_standard_error():
    assert metrics.standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)
    assert metrics.standard_error(torch.tensor([float("inf"), 3.0])) == 0.0


# -- draws --------------------------------------------------------------------------------------------------------


def draws(make, steps: int = 4, layers: int = 3, ratio: float = 0.75) -> torch.Tensor:
    """The tokens drawn, [steps, layers, M]."""
    config = ToMeConfig(method="sample", ratio=ratio, levels="0", min_tokens=0)
    memory: dict = {}
    seed, x = torch.tensor([5]), torch.zeros(2, 64, 4)
    found = []
    for step in range(steps):
        call = make(config, GRID, x.device, seed, step, memory)
        found.append(torch.stack([call.plan(x, GRID).index[0] for _ in range(layers)]))
    return torch.stack(found)


def test_the_labs_walk_is_the_cores():
    assert torch.equal(draws(methods.Draw), draws(methods.plain))


def test_every_draw_is_what_its_name_says():
    independent, step, once = draws(methods.Independent), draws(methods.OnceAStep), draws(methods.Once)
    by_step, by_layer = draws(methods.WalkSteps), draws(methods.WalkLayers)
    flat = independent.flatten(0, 1)
    assert len({tuple(row.tolist()) for row in flat}) == len(flat)
    assert (step == step[:, :1]).all() and not torch.equal(step[0], step[1])
    assert (once == once[:1, :1]).all()
    assert (by_step == by_step[:, :1]).all()
    for run in range(16):  # four steps of a walk see all four tokens of a run; so do four layers
        assert len(set(by_step[:, 0, run].tolist())) == 4
        assert len(set(draws(methods.WalkLayers, 1, 4)[0, :, run].tolist())) == 4
    assert not torch.equal(by_layer[0], by_layer[1])


def test_walk_on_goes_through_a_run_without_a_repeat():
    walk = draws(methods.WalkOn, steps=5, layers=3, ratio=0.9375)  # runs of 16: fifteen draws see fifteen tokens
    assert all(len(set(walk[:, :, run].flatten().tolist())) == 15 for run in range(4))
    core = draws(methods.plain, steps=5, layers=3, ratio=0.9375)
    assert len(set(core[:, :, 0].flatten().tolist())) == 7


def test_cells_2x4_lie_and_raster_runs_follow_the_rows():
    for make, ratio, box in ((methods.Cells2x4, 0.875, (2, 4)), (methods.Raster, 0.75, (1, 4))):
        index = draws(make, 1, 1, ratio)[0, 0]
        cells = {(int(i) // 8 // box[0], int(i) % 8 // box[1]) for i in index}
        assert len(cells) == len(index) == 64 // (box[0] * box[1])


def test_keep_own_is_attention_with_the_query_among_its_keys():
    generator = torch.Generator().manual_seed(0)
    config = ToMeConfig(method="sample", ratio=0.7, levels="0", min_tokens=0)
    x = torch.randn((2, 64, 8), generator=generator)
    layer = ModelCall(config, GRID, x.device, torch.tensor([1, 2])).attention(x, x, x, GRID)
    q, k, v = x[:, None], layer.k[:, None], layer.v[:, None]
    found = methods.keep_own(q, k, v, layer, x[:, None], x[:, None])
    for row in range(2):
        sizes, groups, index = layer.plan.sizes[row], layer.plan.groups[row], layer.plan.index[row]
        for i in range(64):
            weight = torch.zeros(64).index_add(0, index, sizes)  # how many tokens each token stands for
            weight[index[groups[i]]] -= 1
            weight[i] += 1
            logits = x[row] @ x[row, i] / 8**0.5 + weight.log()
            torch.testing.assert_close(found[row, 0, i], logits.softmax(0) @ x[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("options", "expected"), [({"layers": True}, 1), ({"steps": 2}, 6), ({}, 12)])
def test_shared_matches_are_made_once(monkeypatch, options, expected):
    made = []
    real = ModelCall.plan
    monkeypatch.setattr(ModelCall, "plan", lambda self, *a: made.append(1) or real(self, *a))
    config = ToMeConfig(method="merge", ratio=0.5, levels="0", min_tokens=0)
    memory: dict = {}
    for step in range(4):
        call = methods.shared(**options)(config, GRID, torch.device("cpu"), torch.tensor([1]), step, memory)
        plans = [call.plan(torch.randn(1, 64, 4), GRID) for _ in range(3)]
        assert (plans[0] is plans[2]) == bool(options.get("layers"))
    assert len(made) == (4 if options.get("layers") else expected)


def test_the_catalogue_has_what_it_promises():
    sets = methods.CATALOGUE.sets
    assert set(sets) == {"frontier", "sampling", "main", "paper", "floor", "starts", "key", "few", "joint"}
    assert len(sets["key"]) == 16 and sets["few"] == sets["key"][:8]
    assert all(name in methods.CATALOGUE.variants for name in sets["key"])
    families = {methods.CATALOGUE.variants[name].family for name in sets["frontier"]} - {"unmerged"}
    assert families <= set(plot.STYLES)
    for name in ("frontier", "sampling", "main", "starts", "paper", "key", "few", "joint"):
        assert sets[name][:2] == [methods.UNMERGED, methods.BASELINE]


# -- the page -----------------------------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "quality.md"


def test_the_page_agrees_with_the_csv():
    text = PAGE.read_text(encoding="utf-8")
    assert plot.with_tables(text, results()) == text, "run: python -m quality.plot ... --tables docs/quality.md"
    for name in plot.TABLES:
        assert f"<!-- table {name} -->" in text


def test_a_changed_number_is_noticed():
    rows = results()
    row = next(row for row in rows if row["variant"] == methods.BASELINE and row["file"] == MAIN)
    row["psnr"] = "99.000"
    text = PAGE.read_text(encoding="utf-8")
    assert plot.with_tables(text, rows) != text


def test_the_results_name_their_origin():
    for row in results():
        assert row["device"] and row["torch"] and row["date"] and row["commit"] and row["model"], row["variant"]


def test_a_second_models_rows_have_tables_of_their_own():
    rows = results()
    second = [dict(row, model="other", file="other", psnr="77.0") for row in rows]
    page = "<!-- table presets -->\n<!-- end -->\n<!-- table presets@other -->\n<!-- end -->"
    alone, both = plot.with_tables(page, rows), plot.with_tables(page, rows + second)
    assert "Not measured yet" in alone
    assert alone.split("<!-- end -->")[0] == both.split("<!-- end -->")[0]
    assert both.count("77.0 ") == len(plot.PRESETS)


def test_a_samplers_title_tells_its_guidance():
    assert plot.sampler_title("ddim30") == "DDIM, 30 steps"
    assert plot.sampler_title("ddim30@g7.5") == "DDIM, 30 steps, guidance 7.5"
