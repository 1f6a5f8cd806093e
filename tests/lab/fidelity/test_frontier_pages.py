"""What a generation takes, which choices nothing beats, and the tables and charts of it, from CSVs made up here."""

from __future__ import annotations

import pytest

from lab import store
from lab.pages import fidelity_plots, fill, frontier_tables, option_tables
from lab.pages.fidelity_tables import preset_variant
from lab.pages.frontier_tables import fastest
from lab.pages.frontier_times import PLACES, Place, best, frontier_rows
from lab.store import RESULTS
from shared_tome.methods import PRESETS

ABOUT = {"machine": "a GPU", "driver": "1", "torch": "2", "date": "2026-01-01", "commit": "abc", "versions": "x 1"}
SAME = {"sampler": "flow28", "pictures": 8, "precision": "half", "device": "a GPU", "model": "1234", **ABOUT}


def row(variant, family, psnr, whole=0.0, merged=0.0, both=0.0, held=0.0, method="", ratio=0.0):
    calls = {"calls_whole": whole, "calls_merged": merged, "calls_both": both, "calls_held": held}
    rest = {"ssim": 0.9, "fd_gap": "", "fd_gap_se": "", "texture": 0.1, "texture_se": 0.01, "psnr_se": 0.5}
    return {"variant": variant, "family": family, "psnr": psnr, "method": method, "ratio": ratio, "attention": 0.5,
            **calls, **rest, **SAME}  # fmt: skip


ROWS = [
    row("unmerged", "unmerged", "inf", 1.0),
    row("unmerged again", "unmerged", 60.0, 1.0),
    row("Quality", "ToMe", 40.0, 0.2, 0.8, method="multires", ratio=0.75),
    row("Balanced", "ToMe", 36.0, 0.0, 1.0, method="multires", ratio=0.75),
    row("Fast", "ToMe", 31.0, 0.1, 0.9, method="multires", ratio=0.84),
    row("EasyCache 0.2", "EasyCache", 39.0, 0.6),
    row("EasyCache 0.2 + Balanced", "EasyCache + Balanced", 35.0, 0.0, 0.6, method="multires", ratio=0.75),
    row("21 steps", "fewer steps", 30.0, 0.75),
    row("mean tail 0.84", "pooled tail", 25.0, 0.0, 1.0, method="mean tail", ratio=0.84),
    row("outputs 1 of 2", "outputs reused", 43.0, 0.6),
    row("outputs 1 of 4", "outputs reused", 33.0, 0.4),
    row("attention 1 of 2", "attention held", 45.0, 0.6, held=0.4),
    row("attention 1 of 2, multires 0.84 + residual", "drawn + residual", 50.0, 0.2, 0.4, 0.4, 0.0, "multires", 0.84),
]


def about(value):
    """Speeds stand in CSVs with six digits here."""
    return pytest.approx(value, abs=1e-5)


def text(rows):
    return [{key: str(value) for key, value in one.items()} for one in rows]


@pytest.fixture
def results(tmp_path):
    """Flux at two sizes: a step with multires 0.67, 0.77, 0.84 takes 0.8, 0.7, 0.65 at one; attention is half."""
    at = {"model": "flux", "size": "2048²", "backend": "cudnn"}
    steps = [
        {**at, "variant": f"multires {ratio}", "speedup": f"{1 / m:.6f}", **ABOUT}
        for ratio, m in (("0.67", 0.8), ("0.77", 0.7), ("0.84", 0.65))
    ]
    store.save(steps, tmp_path / "dit-multires.csv")
    dit = [{**at, "variant": "unmerged", "speedup": 1, "attention_share": ""}]
    dit += [{**at, "variant": "limit", "speedup": 2, "attention_share": 0.5}]
    store.save(dit, tmp_path / "dit.csv")
    unet = {"model": "sd15", "pixels": 1024, "backend": "cudnn"}
    store.save(
        [
            {**unet, "mode": mode, "variant": variant, "speedup": speedup, **ABOUT}
            for mode, factor in (("eager", 9), ("graph", 1))
            for variant, speedup in (("sample 0.75, own token", 1.25 * factor), ("limit", 2.0 * factor))
        ],
        tmp_path / "steps.csv",
    )
    store.save(ROWS, tmp_path / "frontier-dit.csv")
    return tmp_path


def by_name(place):
    return {one["variant"]: place.time(one) for one in text(ROWS)}


def test_times_are_calls_times_steps(results):
    times = by_name(Place("flux", "2048²", folder=results))
    m = 0.8 - 0.1 * 0.8  # of 0.75, between 0.67 and 0.77
    assert times["unmerged"] == 1.0 and times["21 steps"] == 0.75
    assert times["Balanced"] == about(m) and times["Quality"] == about(0.2 + 0.8 * m)
    assert times["Fast"] == about(0.1 + 0.9 * 0.65)
    assert times["EasyCache 0.2 + Balanced"] == about(0.6 * m)
    assert times["attention 1 of 2"] == about(0.6 + 0.4 * 0.5)
    residual = times["attention 1 of 2, multires 0.84 + residual"]
    assert residual == about(0.2 + 0.4 * 0.65 + 0.4 * (0.65 + 0.5))
    assert times["mean tail 0.84"] == about(1 - 0.5 * 0.84)
    assert all(time is None or time <= 1 for time in by_name(Place("flux", "1024²", folder=results)).values())
    assert by_name(Place("flux", "1024²", folder=results))["Fast"] is None  # never measured there
    unet = Place("sd15", "1024²", folder=results)
    assert (unet.attention_share, unet.merged("sample", 0.75)) == (0.5, 0.8)
    assert unet.merged("sample", 0.9375) is None


def test_whole_generations_go_first(results):
    at = {"model": "flux", "size": "2048²", "backend": "cudnn", "of_steps": 20, "skipped": "", **ABOUT}
    at |= {"seconds": 9.0, "decode_s": ""}
    generations = [
        {**at, "choice": "unmerged", "steps": 20, "speedup": 1},
        {**at, "choice": "Balanced", "steps": 20, "speedup": f"{1 / 0.6:.6f}"},
        {**at, "choice": "Fast", "steps": 20, "speedup": f"{1 / 0.55:.6f}"},
        {**at, "choice": "EasyCache 0.2", "steps": 20, "speedup": f"{1 / 0.62:.6f}", "skipped": "5 7 9 11 13 15 17 18"},
        {**at, "choice": "EasyCache 0.2 + Balanced", "steps": 20, "speedup": 4, "skipped": "5 7"},
        {**at, "choice": "SageAttention", "steps": 20, "speedup": ""},
    ]
    store.save(generations, results / "generations.csv")
    place = Place("flux", "2048²", folder=results)
    times = by_name(place)
    assert times["Balanced"] == about(0.6) and times["Quality"] == about(0.2 + 0.8 * 0.6)
    assert times["EasyCache 0.2"] == about(0.62)  # as it was run, with what the node itself takes
    assert times["EasyCache 0.2 + Balanced"] == about(0.6 * 0.6)  # was run with two steps skipped, not eight
    assert place.merged("multires", 0.84) == about((0.55 - 0.1) / 0.9)
    assert "whole generations, cudnn, a GPU" in place.source
    store.save([{**one, "decode_s": 1.0} for one in generations], results / "generations.csv")
    place = Place("flux", "2048²", folder=results)
    assert "whole generations with decoding, cudnn" in place.source
    assert by_name(place)["Fast"] == about((0.55 * 9 + 1) / 10) and by_name(place)["unmerged"] == 1.0
    store.save([{**one, "steps": 4} for one in generations], results / "generations.csv")
    assert "whole generations of 4 steps" in Place("flux", "2048²", folder=results).source


def test_generations_that_spread_are_not_taken(results):
    at = {"model": "flux", "size": "2048²", "backend": "cudnn", "of_steps": 20, "steps": 20, "skipped": "", **ABOUT}
    at |= {"seconds": 1.0, "decode_s": "", "p20": 1.0}
    both = [{**at, "choice": name, "speedup": speedup} for name, speedup in (("unmerged", 1), ("Balanced", 2))]
    for p80, taken in ((1.04, True), (1.06, False)):
        store.save([{**one, "p80": p80} for one in both], results / "generations.csv")
        place = Place("flux", "2048²", folder=results)
        assert by_name(place)["Balanced"] == about(0.5 if taken else 0.8 - 0.1 * 0.8)
        assert ("whole generations" in place.source) is taken


def test_nothing_on_the_frontier_is_beaten():
    found = {"a": (0.5, 30.0), "b": (0.6, 29.0), "c": (0.6, 35.0), "d": (0.6, 34.0), "e": (0.9, 35.0), "f": (1.0, 50.0)}
    assert best(found) == ["a", "c", "f"]


def test_the_table_of_rivals(results):
    places = [Place("flux", "2048²", folder=results)]
    lines = frontier_tables.rivals("dit", results, places).splitlines()
    assert lines[0] == "| what | calls | PSNR, dB | SSIM | Fréchet, change | fine detail, dB | Flux 2048² |"
    assert "| Balanced | 100% | 36.0 ± 0.5 | 0.900 | - | +0.10 ± 0.01 | 72% |" in lines
    assert "| EasyCache 0.2 | 60% | 39.0 ± 0.5 | 0.900 | - | +0.10 ± 0.01 | **60%** |" in lines
    assert not any(line.startswith(("| outputs", "| unmerged", "| 21 steps")) for line in lines)
    assert "rounding alone: 60 dB" in lines[-1] and "steps, cudnn, a GPU, 2026-01-01" in lines[-1]
    assert frontier_tables.rivals("lab", results) == frontier_tables.held("lab", results) == ""


def test_the_table_of_held_attention_is_at_equal_time(results):
    lines = frontier_tables.held("dit", results, [Place("flux", "2048²", folder=results)]).splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[-1].removesuffix(" |") for line in lines[2:]}
    assert cells["outputs 1 of 2"] == "60%" and cells["attention 1 of 2"] == "80% (-)"  # none is as slow
    place = Place("flux", "2048²", folder=results)
    assert frontier_tables.at_time(text(ROWS), place, 0.5) == pytest.approx(38.0)  # between 33 and 43
    assert frontier_tables.at_time(text(ROWS), place, 0.7) is frontier_tables.at_time(text(ROWS), place, 0.3) is None


def test_a_chart_is_drawn_of_what_was_measured(results, tmp_path):
    pytest.importorskip("matplotlib", reason="only the plots need it")
    places = {model: [Place("flux", size, folder=results) for size in ("1024²", "2048²")] for model in ("dit", "lab")}
    made = fidelity_plots.draw_rivals(tmp_path / "images", results, places)
    assert made == [tmp_path / "images" / "frontier-dit.png"] and made[0].stat().st_size > 10_000
    before = made[0].read_bytes()
    fidelity_plots.draw_rivals(tmp_path / "images", results, places)
    assert made[0].read_bytes() == before


def test_the_fastest_that_is_near_enough():
    found = {
        "a": (0.5, 30.0),
        "b": (0.6, 35.0),
        "c": (0.615, 39.0),
        "d": (0.63, 45.0),
        "e": (0.9, 50.0),
        "f": (1.0, 60.0),
    }
    assert fastest(found, 29.0) == "a" and fastest(found, 50.0) == "e"
    assert fastest(found, 33.0) == "c" and fastest(found, 40.0) == "d"  # c is as fast as b, d is not
    assert fastest(found, 55.0) is None  # what saves no time is no choice


def test_the_recipe_names_what_people_can_use(results):
    places = {"dit": [Place("flux", size, folder=results) for size in ("1024²", "2048²")], "lab": PLACES["lab"]}
    lines = frontier_tables.recipe(results, places).splitlines()
    assert lines[0] == "| time of | 50 dB or more | 39 dB or more | 33 dB or more |"
    cells = ("Flux 2048²", "unmerged", "EasyCache 0.2, 60%, 39.0 dB", "EasyCache 0.2 + Balanced, 43%, 35.0 dB")
    assert lines[3] == f"| {' | dit: '.join(cells)} |"
    assert len(lines) == 6 and lines[5].startswith("dit: ") and "mean tail" not in "".join(lines)
    assert frontier_tables.recipe(results, {"lab": PLACES["lab"]}) == frontier_tables.when(results) == ""


def test_the_recipe_has_a_row_a_place_with_all_models(results):
    store.save(
        [row("unmerged", "unmerged", "inf", 1.0), row("14 steps", "fewer steps", 52.0, 0.5)],
        results / "frontier-lab.csv",
    )
    place = Place("flux", "2048²", folder=results)
    lines = frontier_tables.recipe(results, {"dit": [place], "lab": [place]}).splitlines()
    assert lines[2].startswith("| Flux 2048² | dit: unmerged<br>lab: 14 steps, 50%, 52.0 dB |")


def test_the_committed_recipe_has_ten_rows_at_most():
    rows = [line for line in frontier_tables.recipe().splitlines() if line.startswith("| ")][2:]
    assert 7 <= len(rows) <= 10


def test_the_three_lines_have_the_files_numbers():
    lines, demo = frontier_tables.when().splitlines(), {row["variant"]: row for row in frontier_rows("demo")}
    assert [line.split("**")[1] for line in lines] == ["ToMe alone", "Something else", "Both together"]
    time = Place("sd15", "2048²").time(demo["EasyCache 0.1 + Fast"])
    lab = {row["variant"]: row for row in frontier_rows("lab")}
    near = [f"{float(rows['Balanced']['psnr']):.0f}" for rows in (demo, lab)]
    assert f"{time:.0%}" in lines[2] and f"at {' and '.join(near)} dB on" in lines[0]


def test_quality_says_how_far_the_same_rows_of_more_pictures_are():
    """Two tables have the same choice, of 72 or 40 pictures and of more."""
    more = {model: option_tables.measured(model) for model in ("demo", "lab")}
    more |= {name: store.read(RESULTS / "fidelity" / f"multires-{name}.csv") for name in ("dit", "dit-fine")}
    apart = []
    for model, rows in more.items():
        known = {row["variant"]: float(row["psnr"]) for row in rows if row["sampler"] in ("ddim30", "flow28")}
        unet = {name: preset_variant(name) for name in PRESETS if model in ("demo", "lab")}
        found = {unet.get(one["variant"], one["variant"]): float(one["psnr"]) for one in frontier_rows(model)[2:]}
        apart += [abs(found[name] - known[name]) for name in found.keys() & known.keys()]
    page = (fill.ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    assert f"differ from those of more pictures above by up to {max(apart):.1f} dB" in page and len(apart) > 10


def test_readmes_chart_is_drawn_where_all_of_it_was_measured(results, tmp_path):
    pytest.importorskip("matplotlib", reason="only the plots need it")
    flux = ("dit", Place("flux", "2048²", folder=results))
    (made,) = fidelity_plots.draw_main(tmp_path / "images", results, [flux, flux])
    assert made.name == "frontier.png" and made.stat().st_size > 10_000
    assert fidelity_plots.draw_main(tmp_path / "none", results, [flux, ("lab", flux[1])]) == []
    assert not (tmp_path / "none").exists()


def test_what_readmes_chart_shows_of_a_family():
    shown = {
        family: fidelity_plots.series_of(family)
        for family in ("ToMe", "EasyCache", "EasyCache + Fast", "fewer steps + Fast")
    }
    both = {"EasyCache + Fast": "both", "fewer steps + Fast": "both"}
    assert shown == {"ToMe": "ToMe", "EasyCache": "EasyCache", **both}
    left_out = ("LazyCache", "LazyCache + Fast", "EasyCache + pooled tail", "unmerged")
    assert not any(map(fidelity_plots.series_of, left_out))


def test_the_table_of_tiles_has_the_nearest_first(tmp_path):
    assert frontier_tables.tiles("demo", tmp_path) == ""
    tiles = row("HyperTile 8x8", "HyperTile", 17.0, 1.0)
    store.save([ROWS[0], tiles, row("Fast", "ToMe", 48.0, 0.1, 0.9)], tmp_path / "tiles-demo.csv")
    lines = frontier_tables.tiles("demo", tmp_path).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["Fast", "HyperTile 8x8"]
    assert "17.0 ± 0.5" in lines[3] and "Times" not in lines[-1]


def test_the_table_of_steps_has_each_number_once(tmp_path):
    assert frontier_tables.steps(tmp_path) == ""
    for model, counts in (("demo", (9, 10)), ("lab", (10, 11))):
        fewer = [{**row(f"{n} steps", frontier_tables.FEWER, 20.0 + n, n / 12), "steps": n} for n in counts]
        store.save([ROWS[0], row("Fast", "ToMe", 48.0, 0.1, 0.9), *fewer], tmp_path / f"steps-{model}.csv")
    lines = frontier_tables.steps(tmp_path).splitlines()
    cells = [[cell.split(" ±")[0] for cell in line.strip("| ").split(" | ")] for line in lines]
    assert cells[0] == ["steps", "demo, PSNR, dB", "lab, PSNR, dB"]
    assert cells[2:5] == [["11", "-", "31.0"], ["10", "30.0", "30.0"], ["9", "29.0", "-"]]


def test_every_model_and_family_is_known():
    from lab.fidelity.methods import rivals

    assert {"rivals", "held"} <= set(fill.MAKERS) and set(PLACES) == {"demo", "lab", "dit", "dit-fine"}
    for transformer in (False, True):
        for variant in rivals(28, transformer).values():
            alone, _, preset = variant.family.rpartition(" + ")
            known = {"unmerged", *fidelity_plots.RIVALS, *frontier_tables.HELD, "HyperTile"}
            assert (alone if preset in PRESETS else variant.family) in known
    assert set(fidelity_plots.WITH) == set(PRESETS)
    for places in PLACES.values():
        for place in places:
            assert place.attention_share is not None, place  # committed figures know every place
            assert RESULTS in place.folder.parents
