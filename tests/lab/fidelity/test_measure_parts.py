"""The lab's samplers, metrics, catalogue and page, each against something known."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from lab.fidelity import methods, metrics
from lab.fidelity.measure import COLUMNS, describe
from lab.models import samplers
from lab.models.samplers import cosine_sigmas
from lab.pages import fidelity_tables as plot
from lab.pages import fill
from lab.pages.fidelity_tables import MAIN, results
from shared_tome import ToMeConfig
from shared_tome.methods import Preset


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


def gray(values: torch.Tensor) -> torch.Tensor:
    """[h, w] -> [1, 3, h, w]."""
    return values.double().expand(1, 3, -1, -1)


def test_fine_detail_of_known_pictures():
    y, x = torch.arange(32)[:, None], torch.arange(32)
    board = ((y + x) % 2).double() * 100  # nothing but the finest detail: half of its difference squared
    assert metrics.fine_energy(gray(board)).item() == pytest.approx(50**2)
    stripes = (x % 2).double().expand(32, -1) * 100
    assert metrics.fine_energy(gray(stripes)).item() == pytest.approx(50**2)
    assert metrics.fine_energy(gray(y * 3.0 + x * 2.0)).item() == pytest.approx(0.0)  # a slope has none
    colour = torch.stack((board, torch.zeros(32, 32), torch.zeros(32, 32)))[None]
    assert metrics.fine_energy(colour).item() == pytest.approx((0.299 * 50) ** 2)


def test_fine_detail_tells_blur_from_noise():
    a = pictures(2, 0, 64)
    noise = torch.randn((2, 1, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert metrics.texture(a, a).tolist() == [0.0, 0.0]
    half = a / 2 + 30
    assert metrics.texture(half, a).tolist() == pytest.approx([-6.02] * 2, abs=0.01)
    blurred = torch.nn.functional.avg_pool2d(a, 3, 1, 1)
    assert (metrics.texture(blurred, a) < -6).all() and (metrics.texture(a, blurred) > 6).all()
    # White noise keeps 1 - 2 / 4 + (6 / 16)^2 of its variance without the low-pass.
    flat = torch.full((2, 3, 64, 64), 100.0)
    expected = 0.640625 * noise[:, 0].var(dim=(1, 2)) * 100
    assert metrics.fine_energy(flat + 10 * noise).tolist() == pytest.approx(expected.tolist(), rel=0.06)
    assert (metrics.texture(a + 60 * noise, a) > 1).all()
    assert metrics.texture(flat, flat + 1e-3).abs().max() < 1e-9  # nothing against nothing
    assert metrics.texture(flat.round() + 0.1 * noise, flat).abs().max() < 0.5  # nor what 8 bits cannot show


def test_frechet_of_known_gaussians():
    a = torch.randn((4000, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T  # exactly standard
    assert metrics.frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    assert metrics.frechet(a, a + 2) == pytest.approx(12.0)  # three means moved by 2
    assert metrics.frechet(3 * a, a) == pytest.approx(3 * (3 - 1) ** 2)  # three deviations, 3 against 1
    gap, error = metrics.frechet_gap(a + 1, a, a, draws=20)
    assert gap == pytest.approx(3.0) and 0 < error < 0.5
    assert metrics.frechet_gap(a, a, a + 1, draws=5) == (0.0, 0.0)
    mixed = a @ torch.randn((3, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert metrics.frechet(a[:50], mixed) == pytest.approx(metrics.frechet(mixed, a[:50]))
    generator = torch.Generator().manual_seed(0)
    index = [torch.randint(4000, (4000,), generator=generator) for _ in range(3)]
    gaps = [metrics.frechet(mixed[i], a + 1) - metrics.frechet(a[i], a + 1) for i in index]
    assert metrics.frechet_gap(mixed, a, a + 1, draws=3)[1] == pytest.approx(torch.tensor(gaps).std().item())


def test_standard_error():
    assert metrics.standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)
    assert metrics.standard_error(torch.tensor([float("inf"), 3.0])) == 0.0


# -- the catalogue ------------------------------------------------------------------------------------------------


def test_the_catalogue_has_what_it_promises():
    sets = methods.CATALOGUE.sets
    multires = {"multires", "multires-few", "multires-levels", "multires-video"}
    assert set(sets) == {"frontier", "main", "paper", "floor", "starts", "key", "few", "own", *multires}
    assert len(sets["key"]) == 16 + 7 and sets["key"][16:] == sets["own"][2:]
    assert sets["few"] == [*sets["key"][:8], "sample 0.75, own token kept", "sample 0.9375, own token kept"]
    names = methods.CATALOGUE.variants
    assert all(name in names for some in sets.values() for name in some)
    assert all(any(name in some for some in sets.values()) for name in names)
    shown = [*sets["frontier"], *sets["own"]]
    families = {methods.CATALOGUE.variants[name].family for name in shown} - {"unmerged"}
    assert families <= set(plot.STYLES)
    assert sets["multires"][:2] == [methods.UNMERGED, "sample 0.75, own token kept"]
    for name in set(sets) - {"floor", *multires}:
        assert sets[name][:2] == [methods.UNMERGED, methods.BASELINE]


@pytest.mark.parametrize("default", [False, True])
def test_own_tokens_are_kept_where_the_name_says_so_whatever_the_default(monkeypatch, default):
    monkeypatch.setattr(methods, "ToMeConfig", defaulting(default))
    found = methods.catalogue().variants
    assert sum(variant.config.own_token for variant in found.values()) == len(methods.OWN_KEY) + 1  # one with one draw
    for name, variant in found.items():
        assert variant.config.own_token == variant.config.keeps_self == name.endswith(", own token kept"), name
        assert ("own_token=True" in describe(variant)) == variant.config.own_token
        assert "own_token=False" not in describe(variant)


def test_own_tokens_are_the_only_difference():
    """A variant and that with own tokens are alike in all else, and timed alike."""
    found = methods.CATALOGUE.variants
    pairs = [(name, name.removesuffix(", own token kept")) for name in methods.CATALOGUE.sets["own"][2:]]
    for own, name in pairs:
        assert found[own].config.replace(own_token=False) == found[name].config
        assert found[own].timed and found[name].timed


# -- the page -----------------------------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "quality.md"
KEY = methods.CATALOGUE.sets["key"][:16]


def test_the_page_agrees_with_the_csv():
    text = PAGE.read_text(encoding="utf-8")
    assert fill.filled(text) == text, "run `python -m lab.pages`"
    for name in plot.TABLES:
        assert re.search(rf"<!-- {name}( (lab|dit))? -->", text), name


def test_a_changed_number_is_noticed():
    rows = results()
    row = next(row for row in rows if row["variant"] == methods.BASELINE and row["file"] == MAIN)
    row["psnr"] = "99.000"
    text = PAGE.read_text(encoding="utf-8")
    assert fill.filled(text, {**fill.MAKERS, **fill.of_fidelity(rows)}) != text


def test_the_results_name_their_origin():
    for row in results():
        assert row["device"] and row["torch"] and row["date"] and row["commit"] and row["model"], row["variant"]


def test_a_second_models_rows_have_tables_of_their_own():
    rows = results()
    second = [dict(row, model="other", file="other", psnr="77.0") for row in rows]
    page = "<!-- presets_fidelity -->\n<!-- end -->\n<!-- presets_fidelity other -->\n<!-- end -->"
    alone, both = fill.filled(page, fill.of_fidelity(rows)), fill.filled(page, fill.of_fidelity(rows + second))
    assert "Not measured yet" in alone
    assert alone.split("<!-- end -->")[0] == both.split("<!-- end -->")[0]
    assert both.count("77.0 ") == len(plot.PRESETS)


def defaulting(own: bool):
    """ToMeConfig with another default for own tokens."""
    return lambda **options: ToMeConfig(**{"own_token": own, **options})


def measured(names, sampler: str = "ddim30", **cells: str) -> list[dict[str, str]]:
    """Rows as of a file "fresh" of a model of its own."""
    empty = dict.fromkeys((*COLUMNS, "singles", "yardstick"), "")
    numbers = {"psnr": "30", "psnr_se": "1", "gain": "2", "gain_se": "1", "ssim": "0.9", "cost": "0.25"}
    numbers |= {"cost_all": "0.3", "fd_gap": "1", "fd_gap_se": "1", "model": "fresh", "file": "fresh", "images": "2"}
    return [
        {**empty, **numbers, "variant": name, "sampler": sampler, "family": methods.CATALOGUE.variants[name].family}
        | cells
        for name in names
    ]


def page_of(table: str, rows: list[dict[str, str]]) -> str:
    return fill.filled(f"<!-- {table} -->\n<!-- end -->", fill.of_fidelity(rows))


@pytest.mark.parametrize("own", [False, True])
def test_presets_are_variants_of_the_catalogue(monkeypatch, own):
    """Whatever the default: each says whether it keeps own tokens."""
    monkeypatch.setattr(plot, "ToMeConfig", defaulting(own))
    for name, preset in plot.PRESETS.items():
        config = methods.CATALOGUE.variants[plot.preset_variant(name)].config
        assert "own_token" in preset.options
        wanted = ToMeConfig(**preset.options).resolved(multires=False)  # what auto is on U-Nets
        assert all(getattr(config, option) == getattr(wanted, option) for option in preset.options)


def test_a_preset_says_so_itself(monkeypatch):
    """Over the default, whichever it is."""
    for own in (True, False):
        monkeypatch.setattr(plot, "ToMeConfig", defaulting(not own))
        options = {"method": "sample", "ratio": 0.9375, "start": 0.1, "own_token": own}
        monkeypatch.setitem(plot.PRESETS, "one", Preset("", options))
        assert plot.preset_variant("one") == "sample 0.9375 from 0.1" + ", own token kept" * own
    monkeypatch.setitem(plot.PRESETS, "one", Preset("", {"method": "downsample", "ratio": 0.75, "start": 0.2}))
    assert plot.preset_variant("one") == "downsample 0.75 from 0.2"


def test_the_table_of_presets_needs_them_all():
    own = [plot.preset_variant(name) for name in plot.PRESETS]
    whole = page_of("presets_fidelity fresh", measured(own))
    assert all(f"| {name} | {variant} |" in whole for name, variant in zip(plot.PRESETS, own, strict=True))
    without = [name.removesuffix(", own token kept") for name in own]
    assert own != without and fill.NOTHING in page_of("presets_fidelity fresh", measured(own[:1] + without))


def test_fine_detail_is_shown_where_it_is_known():
    old, fresh = measured(KEY[:6]), measured(KEY[:6], texture="-1.234", texture_se="0.1")
    assert "fine detail" not in page_of("frontier fresh", old)
    both = page_of("frontier fresh", fresh + measured(["sample 0.984375"]))
    assert "| fine detail, dB |" in both and "| -1.23 ± 0.10 |" in both
    assert next(line for line in both.splitlines() if "sample 0.984375" in line).endswith(" | - |")
    assert "fine detail" not in page_of("frontier fresh", fresh + measured(KEY[6:16]))  # most know none


@pytest.mark.parametrize(("yardstick", "shown"), [("1.41", True), ("1.35", False), ("", False)])
def test_the_speed_of_another_run_is_shown_where_both_found_tomesd_alike(yardstick, shown):
    timed = {"step_ms": "10", "speedup": "1.50"}
    first = measured(["unmerged", "tomesd 0.5"], yardstick="1.40", **timed)
    other = measured(["sample 0.75", "sample 0.5"], file="other", yardstick=yardstick, **timed)
    lines = {line.split(" | ")[0]: line for line in page_of("frontier fresh", first + other).splitlines()}
    assert lines["| tomesd 0.5"].endswith("| 10.0 | 1.50x |")
    assert lines["| sample 0.75"].endswith("|  | 1.50x |" if shown else "|  |  |")


def test_a_column_has_means_over_the_most_pictures_alone():
    many, few = measured(KEY[:6], images="264"), measured(KEY[:8], images="8", psnr="50")
    page = page_of("samplers fresh", few + many + measured(KEY[:8], "lcm6", images="8", psnr="40"))
    assert "50.0" not in page and "30.0 ± 1.0 | 40.0 ± 1.0 |" in page and f"| {KEY[7]} |" not in page


@pytest.mark.parametrize(("table", "sampler"), [("guidance", "ddim30@g7.5"), ("inpaint", "inpaint30")])
def test_other_samplers_have_tables_of_their_own(table, sampler):
    names = methods.CATALOGUE.sets["key"]
    rows = measured(names, sampler)
    assert all(f"| {name} |" in page_of(f"{table} fresh", rows) for name in names)
    assert fill.NOTHING in page_of(f"{table} fresh", measured(KEY[:8], "lcm6"))


def test_models_stand_side_by_side(monkeypatch):
    monkeypatch.setattr(plot, "MODELS", ("fresh", "other", "absent"))
    first = measured(KEY)
    second = measured(KEY[:4], "flow28", model="o", file="other", psnr="44")
    page = page_of("models", first + second)
    assert "| what | fresh, DDIM, 30 steps | other, Euler, 28 steps |" in page
    assert "| sample 0.75 | 30.0 ± 1.0 | 44.0 ± 1.0 |" in page
    assert f"| {KEY[4]} |" not in page
    assert fill.NOTHING in page_of("models", first)


def test_a_samplers_title_tells_its_guidance():
    assert plot.sampler_title("ddim30") == "DDIM, 30 steps"
    assert plot.sampler_title("ddim30@g7.5") == "DDIM, 30 steps, guidance 7.5"
