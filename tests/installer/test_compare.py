"""What `install.py compare` plans, how it edits a workflow, how it goes on, and what it refuses before it begins."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import stand_ins
from PIL import Image

import install
from installer import environment, likeness, run, sheet, workflow
from installer.compare import drawn, graph, plan, results, schema
from installer.compare.graph import TAKE, Graph
from installer.compare.journal import Journal
from installer.compare.plan import FIRST, FLOOR, FLOOR_NAME, TIMED, Picture, Request, Variant
from installer.console import SetupError
from installer.paths import COMPARED
from shared_tome.methods import PRESETS

VARIANTS = plan.all_variants({name: preset.options for name, preset in PRESETS.items()})
TOME = {"class_type": "ToMe", "inputs": {"model": ["model", 0], "ratio": 0.5, "levels": "0"}}


def node(inputs: str = "", outputs: str = "", output_node: bool = False, **defaults) -> dict:
    """What /object_info says of a node; inputs and outputs as "name:TYPE"."""
    kinds = {name: [kind, {}] for name, kind in (one.split(":") for one in inputs.split())}
    kinds |= {name: ["FLOAT", {"default": value}] for name, value in defaults.items()}
    return {"input": {"required": kinds}, "output": outputs.split(), "output_node": output_node}


SAMPLER = "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT seed:INT steps:INT"
KNOWN = {
    "CheckpointLoaderSimple": node("ckpt_name:COMBO", "MODEL CLIP VAE"),
    "UNETLoader": node("unet_name:COMBO", "MODEL"),
    "LoraLoader": node("model:MODEL clip:CLIP", "MODEL CLIP"),
    "CLIPTextEncode": node("text:STRING clip:CLIP", "CONDITIONING"),
    "FluxGuidance": node("conditioning:CONDITIONING guidance:FLOAT", "CONDITIONING"),
    "BasicGuider": node("model:MODEL conditioning:CONDITIONING", "GUIDER"),
    "RandomNoise": node("noise_seed:INT", "NOISE"),
    "BasicScheduler": node("model:MODEL steps:INT", "SIGMAS"),
    "SamplerCustomAdvanced": node("noise:NOISE guider:GUIDER sigmas:SIGMAS latent_image:LATENT", "LATENT LATENT"),
    "EmptyLatentImage": node("width:INT height:INT", "LATENT"),
    "LatentUpscale": node("samples:LATENT width:INT height:INT", "LATENT"),
    "KSampler": node(SAMPLER, "LATENT"),
    "KSamplerAdvanced": node(SAMPLER.replace("seed:", "noise_seed:"), "LATENT"),
    "VAEDecode": node("samples:LATENT vae:VAE", "IMAGE"),
    "CreateVideo": node("images:IMAGE", "VIDEO"),
    "SaveVideo": node("video:VIDEO", "", True),
    "SaveImage": node("images:IMAGE", "", True),
    "PreviewImage": node("images:IMAGE", "", True),
    "ToMe": node("model:MODEL", "MODEL", ratio=0.75, start=0.0),
    "EasyCache": node("model:MODEL", "MODEL", reuse_threshold=0.2),
    "LazyCache": node("model:MODEL", "MODEL"),
}


def ready(subject=None, **settings) -> dict:
    """The command's own workflow of a checkpoint."""
    subject = subject or workflow.Subject("a", "a cat", 7)
    return workflow.checkpoint_workflow("m.safetensors", subject, workflow.Settings(20, 7.0, **settings), None)


def chain(made: dict, id: str) -> list[str]:
    """The classes on the model's way to a node, from it upwards."""
    found = []
    while "model" in made[id]["inputs"]:
        id = made[id]["inputs"]["model"][0]
        found.append(made[id]["class_type"])
    return found


# -- the plan -----------------------------------------------------------------------------------------------------


def test_the_default_set_is_at_most_40_generations_of_20_steps(tmp_path):
    file = stand_ins.write(tmp_path, {"m.safetensors": ""}) / "m.safetensors"
    request = plan.make_request(file, None, None, None)
    jobs = plan.jobs(request.sizes, VARIANTS, len(request.pictures))
    assert len(jobs) == 39 and request.steps == 20 and request.sizes == ("512x512",)
    assert {picture.seed for picture in request.pictures} == {7, 8}
    assert len({picture.prompt for picture in request.pictures}) == 2 and not request.own_prompts
    assert len({job.key for job in jobs}) == len(jobs)


def test_by_turns_behind_what_loads_and_tunes():
    jobs = plan.jobs(["64x64"], VARIANTS, 3)
    assert jobs[0].kind == FLOOR and jobs[0].variant.split
    assert [job.kind for job in jobs[1 : 1 + len(VARIANTS)]] == [FIRST] * len(VARIANTS)
    for picture in range(3):
        timed = [job for job in jobs if job.picture == picture and job.kind != FIRST]
        assert timed[0].kind == FLOOR and timed[1].variant == VARIANTS[picture], "the prompt is encoded by then"
        assert Counter(job.variant.name for job in timed[1:]) == Counter(one.name for one in VARIANTS)


def test_what_a_new_server_would_time_cold_is_warmed_up():
    jobs = plan.jobs(["64x64"], VARIANTS, 2)
    assert plan.to_warm_up(jobs) == [], "the firsts do it"
    assert [job.variant.name for job in plan.to_warm_up(jobs[4:])] == ["unmerged", "Quality", "Balanced"]
    assert len(plan.to_warm_up(jobs[10:])) == len(VARIANTS)


@pytest.mark.parametrize(
    ("has_cache", "own_cache", "steps", "left", "words"),
    [
        (True, False, 20, [], []),
        (False, False, 20, ["EasyCache", "EasyCache + Balanced"], ["no such node"]),
        (True, True, 20, ["EasyCache", "EasyCache + Balanced"], ["of that kind already"]),
        (True, False, None, ["fewer steps"], ["Fewer steps"]),
        (True, False, 1, ["fewer steps"], ["Fewer steps"]),
        (False, False, 2, ["fewer steps", "EasyCache", "EasyCache + Balanced"], ["no such node", "Fewer steps"]),
        (True, False, 3, [], []),
    ],
)
def test_what_cannot_be_run_is_left_out_with_the_reason(has_cache, own_cache, steps, left, words):
    found, notes = plan.possible(VARIANTS, has_cache, own_cache, steps)
    assert [one.name for one in VARIANTS if one not in found] == left
    assert len(notes) == len(words) and all(part in note for part, note in zip(words, notes, strict=True))


def test_time_left_counts_pixels_and_steps():
    small, large = (plan.Job(size, VARIANTS[0], 0, TIMED) for size in ("512x512", "1024x1024"))
    assert plan.time_left([small, small], [small], 10.0) == "20 s left"
    assert plan.time_left([large, large], [small], 30.0) == "4 min left"
    assert plan.time_left([plan.Job("512x512", Variant("x", share=0.5), 0, TIMED)], [small], 10.0) == "5 s left"


@pytest.mark.parametrize(("text", "size"), [("512", "512x512"), ("1536X1024", "1536x1024"), (" 64 ", "64x64")])
def test_sizes(text, size):
    assert plan.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "512x", "500", "32", "8200", "512x512x3", "-512", "512.0"])
def test_a_size_that_is_none_is_named_with_the_range(text):
    with pytest.raises(SetupError, match=f"--sizes {text}: .*64 to 8192"):
        plan.parse_size(text)


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa cat\n\n  a dog  \na cat\n", encoding="utf-8")
    request = plan.make_request(None, tmp_path / "flow.json", None, file)
    assert [picture.prompt for picture in request.pictures] == ["a cat", "a dog"] * 2 and request.own_prompts
    for data, words in ((b"", "has 0 prompts"), (b"\xff\xfe\x00", "no text in UTF-8")):
        file.write_bytes(data)
        with pytest.raises(SetupError, match=words):
            plan.make_request(None, tmp_path / "flow.json", None, file)
    with pytest.raises(SetupError, match="classes, not prompts"):
        plan.make_request(None, None, None, file)


# -- workflows ----------------------------------------------------------------------------------------------------


def test_tome_and_easycache_stand_before_the_sampler_and_nothing_else_changes():
    base = Graph(ready(), KNOWN)
    for variant in VARIANTS:
        made = base.with_variant(variant, 3)
        wanted = ["ToMe"] * (variant.tome is not None) + ["EasyCache"] * variant.cache + ["ToMeCompareModel"]
        assert chain(made, "sampler") == [*reversed(wanted), "CheckpointLoaderSimple"], variant.name
        assert made["sampler"]["inputs"]["steps"] == (15 if variant.name == "fewer steps" else 20)
        assert "show" not in made and made[TAKE]["inputs"]["images"] == ["picture", 0]
    assert base.timed() == {"sampler", "picture"} and base.steps() == 20 and base.loaded() == ["m.safetensors"]
    assert base.workflow["sampler"]["inputs"]["model"] == ["model", 0], "the base stays as it is"


def test_a_preset_sets_its_options_and_the_node_has_the_others():
    (made,) = (
        one for one in Graph(ready(), KNOWN).with_variant(VARIANTS[1], 0).values() if one["class_type"] == "ToMe"
    )
    assert made["inputs"] == {"start": 0.2, "ratio": 0.75, "method": "auto", "own_token": True, "model": ["model", 0]}


def test_a_tome_node_that_is_there_is_used_with_its_values():
    flow = ready() | {"tome": copy.deepcopy(TOME)}
    flow["sampler"]["inputs"]["model"] = ["tome", 0]
    base = Graph(flow, KNOWN)
    assert chain(base.with_variant(VARIANTS[0], 0), "sampler") == ["ToMeCompareModel", "CheckpointLoaderSimple"]
    made = base.with_variant(VARIANTS[2], 0)
    (tome,) = (one["inputs"] for one in made.values() if one["class_type"] == "ToMe")
    assert tome["levels"] == "0" and tome["ratio"] == 0.75


def hires(first: list, second: list) -> dict:
    """Two samplers, one behind the other."""
    flow = ready() | {"tome": copy.deepcopy(TOME)}
    again = copy.deepcopy(flow["sampler"])
    flow["large"] = {
        "class_type": "LatentUpscale",
        "inputs": {"samples": ["sampler", 0], "width": 1024, "height": 1024},
    }
    again["inputs"] |= {"latent_image": ["large", 0], "model": second}
    flow["sampler"]["inputs"]["model"] = first
    flow["picture"]["inputs"]["samples"] = ["again", 0]
    return flow | {"again": again}


def test_only_the_pass_that_has_tome_gets_it_and_both_are_timed():
    base = Graph(hires(["model", 0], ["tome", 0]), KNOWN)
    made = base.with_variant(VARIANTS[-1], 5)
    assert chain(made, "sampler") == ["ToMeCompareModel", "CheckpointLoaderSimple"], "sampled anew, and not merged"
    assert chain(made, "again") == ["ToMeCompareModel", "EasyCache", "ToMe", "CheckpointLoaderSimple"]
    assert base.timed() == {"sampler", "large", "again", "picture"}
    base.set_size("640x512")
    assert base.workflow["latent"]["inputs"]["width"] == 640 and base.workflow["large"]["inputs"]["width"] == 1024


LORAS = {
    "LoraWithWords": node("model:MODEL clip:CLIP", "MODEL CLIP STRING"),
    "SamplerNames": {**node("model:MODEL"), "output": ["MODEL", ["euler", "heun"]]},  # choices come as a list
    "KSampler (with all)": node(SAMPLER, "MODEL LATENT"),
}


@pytest.mark.parametrize("kind", ["LoraWithWords", "SamplerNames"])
def test_a_node_that_gives_words_beside_the_model_changes_the_model(kind):
    flow = ready() | {"extra": {"class_type": kind, "inputs": {"model": ["model", 0]}}}
    flow["sampler"]["inputs"]["model"] = ["extra", 0]
    base = Graph(flow, KNOWN | LORAS)
    assert base.uses == [("sampler", "model")]
    made = base.with_variant(VARIANTS[-1], 5)
    assert chain(made, "sampler") == ["ToMeCompareModel", "EasyCache", "ToMe", kind, "CheckpointLoaderSimple"]


def test_a_sampler_that_hands_its_model_on_gets_tome_once():
    flow = hires(["model", 0], ["sampler", 0])
    flow["sampler"]["class_type"] = "KSampler (with all)"
    flow["large"]["inputs"]["samples"] = ["sampler", 1]
    base = Graph(flow, KNOWN | LORAS)
    made = base.with_variant(VARIANTS[-1], 5)
    assert Counter(one["class_type"] for one in made.values())["ToMe"] == 1
    assert made["again"]["inputs"]["model"] == ["sampler", 0]
    assert base.timed() == {"sampler", "large", "again", "picture"}


def test_samplers_that_share_a_model_share_its_nodes():
    made = Graph(hires(["model", 0], ["model", 0]), KNOWN).with_variant(VARIANTS[-1], 5)
    assert Counter(one["class_type"] for one in made.values())["ToMe"] == 1
    assert made["sampler"]["inputs"]["model"] == made["again"]["inputs"]["model"]


def flux() -> dict:
    """A LoRA, a guider and a sampler of their own, a video at the end."""

    def of(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    return {
        "1": of("UNETLoader", unet_name="sub/flux.safetensors"),
        "2": of("CheckpointLoaderSimple", ckpt_name="text.safetensors"),
        "3": of("LoraLoader", model=["1", 0], clip=["2", 1]),
        "4": of("CLIPTextEncode", text="a cat", clip=["3", 1]),
        "5": of("FluxGuidance", conditioning=["4", 0], guidance=3.5),
        "6": of("BasicGuider", model=["3", 0], conditioning=["5", 0]),
        "7": of("BasicScheduler", model=["3", 0], steps=28),
        "8": of("RandomNoise", noise_seed=1),
        "9": of("EmptyLatentImage", width=64, height=64),
        "10": of("SamplerCustomAdvanced", noise=["8", 0], guider=["6", 0], sigmas=["7", 0], latent_image=["9", 0]),
        "11": of("VAEDecode", samples=["10", 0], vae=["2", 2]),
        "12": of("CreateVideo", images=["11", 0]),
        "13": of("SaveVideo", video=["12", 0]),
    }  # fmt: skip


def test_any_model_through_a_workflow():
    base = Graph(flux(), KNOWN)
    base.set_prompt("a dog")
    base.set_seed(9)
    base.set_size("128x96")
    made = base.with_variant(VARIANTS[-1], 0)
    assert chain(made, "6") == ["ToMeCompareModel", "EasyCache", "ToMe", "LoraLoader", "UNETLoader"]
    assert made["3"]["inputs"] == {"model": ["1", 0], "clip": ["2", 1]}, "so the prompt is not encoded anew"
    assert made["4"]["inputs"]["text"] == "a dog" and made["8"]["inputs"]["noise_seed"] == 9
    assert (made["9"]["inputs"]["width"], made["9"]["inputs"]["height"]) == (128, 96)
    assert base.timed() == {"6", "7", "10", "11"} and made[TAKE]["inputs"]["images"] == ["11", 0]
    assert base.with_variant(VARIANTS[4], 0)["7"]["inputs"]["steps"] == 21
    assert base.loaded() == ["flux.safetensors", "text.safetensors"] and not base.own_cache


def test_fewer_steps_of_a_sampling_in_parts():
    flow = flux()
    for id, first, last in (("20", 0, 10), ("21", 10, 10000)):
        flow[id] = {"class_type": "KSamplerAdvanced", "inputs": {
            "model": ["3", 0], "positive": ["5", 0], "negative": ["5", 0], "latent_image": ["9", 0], "noise_seed": 1,
            "steps": 20, "start_at_step": first, "end_at_step": last}}  # fmt: skip
    flow["21"]["inputs"]["latent_image"] = ["20", 0]
    flow["11"]["inputs"]["samples"] = ["21", 0]
    made = Graph(flow, KNOWN).with_variant(VARIANTS[4], 0)
    parts = [[made[id]["inputs"][name] for name in ("steps", "start_at_step", "end_at_step")] for id in ("20", "21")]
    assert parts == [[15, 0, 8], [15, 8, 10000]]


def test_the_saved_picture_is_compared_not_a_preview():
    flow = hires(["model", 0], ["model", 0])
    flow["early"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["model", 2]}}
    flow["keep"] = {"class_type": "SaveImage", "inputs": {"images": ["early", 0]}}
    assert Graph(flow, KNOWN).image == ["early", 0] and "again" not in Graph(flow, KNOWN).workflow
    del flow["keep"]
    assert Graph(flow, KNOWN).image == ["picture", 0]


def test_a_cache_of_the_workflows_own_is_seen():
    flow = ready() | {"lazy": {"class_type": "LazyCache", "inputs": {"model": ["model", 0]}}}
    flow["sampler"]["inputs"]["model"] = ["lazy", 0]
    assert Graph(flow, KNOWN).own_cache


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f["model"].update(class_type="GGUF"), "has no node GGUF, which the workflow names .node model."),
        (lambda f: f.pop("latent"), "node sampler of the workflow takes latent_image from node latent, which is not"),
        (lambda f: f.pop("show"), "saves and shows no picture"),
        (lambda f: f["picture"]["inputs"].update(samples=["latent", 0]), "no node that takes a MODEL"),
        (lambda f: f["latent"]["inputs"].update(x=["sampler", 0]), "links form a circle at node"),
        (lambda f: [f.update(t={"class_type": "ToMe", "inputs": {}}),
                    f["sampler"]["inputs"].update(model=["t", 0])], "the ToMe node t of the workflow has no model"),
    ],
)  # fmt: skip
def test_a_workflow_that_cannot_be_compared_is_told_in_a_line(change, words):
    flow = ready()
    change(flow)
    with pytest.raises(SetupError, match=words) as told:
        Graph(flow, KNOWN)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "ask", "words"),
    [
        (lambda f: f["8"].update(class_type="UNETLoader", inputs={}), lambda g: g.set_seed(1), "has a seed"),
        (lambda f: f["4"].update(inputs={"clip": ["3", 1]}), lambda g: g.set_prompt("x"), "prompt was not found"),
        (lambda f: f["9"]["inputs"].pop("width"), lambda g: g.set_size("64x64"), "leave --sizes out"),
        (lambda f: f["2"]["inputs"].clear(), lambda g: g.set_checkpoint("x"), "loads no checkpoint"),
    ],
)
def test_what_cannot_be_placed_is_told(change, ask, words):
    flow = flux()
    change(flow)
    with pytest.raises(SetupError, match=words):
        ask(Graph(flow, KNOWN))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ('{"nodes": [], "links": []}', "in the page's own form"),
        ("[]", "is no workflow in API form"),
        ('{"1": {"inputs": {}}}', "node 1 has no class_type"),
        ('{"1": {"class_type": "X"}}', "node 1 has no inputs"),
    ],
)
def test_a_file_that_is_no_workflow_is_told(text, words, tmp_path):
    file = tmp_path / "flow.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SetupError, match=words) as told:
        graph.load(file)
    assert "Export (API)" in told.value.hint
    with pytest.raises(SetupError, match="could not be read"):
        graph.load(tmp_path / "absent.json")


# -- going on -----------------------------------------------------------------------------------------------------


def test_a_journal_goes_on_and_drops_what_was_cut_off(tmp_path):
    first = Journal(tmp_path, {"steps": 20})
    assert not first.begun
    first.write_settings(machine="m")
    first.add("a", {"seconds": 1.5})
    with (tmp_path / COMPARED[0]).open("ab") as file:
        file.write(b'{"key": "b", "seco')
    again = Journal(tmp_path, {"steps": 20})
    assert again.begun and again.records == {"a": {"seconds": 1.5}} and not again.has("b")
    again.write_settings(machine="m")
    again.add("b", {"seconds": 2.0})
    assert Journal(tmp_path, {"steps": 20}).records.keys() == {"a", "b"}
    with pytest.raises(SetupError, match="other settings: steps 20, now 30"):
        Journal(tmp_path, {"steps": 30})
    with pytest.raises(SetupError, match='machine "m", now "other"'):
        again.write_settings(machine="other")


@pytest.mark.parametrize(
    "text", ["mine\n", '{"a": 1}\n', "[1]\n", '{"settings": {}}\n7\n', '{"settings": [1]}\n', "[" * 100_000 + "\n"]
)
def test_a_file_that_is_no_journal_is_left_alone(text, tmp_path):
    (tmp_path / COMPARED[0]).write_text(text)
    with pytest.raises(SetupError, match="is no journal"):
        Journal(tmp_path, {})
    assert (tmp_path / COMPARED[0]).read_text() == text


# -- what comes out -----------------------------------------------------------------------------------------------


@pytest.fixture
def compared(tmp_path):
    """(folder, journal, request) of a comparison with made-up times and pictures."""
    request = Request((Picture("a cat", 7), Picture("a cat", 8)), ("64x64",))
    journal = Journal(tmp_path, request.settings())
    journal.write_settings(
        tome="0.2.0+abc", variants=[vars(one) for one in VARIANTS], notes=[], model_files=["m.safetensors"],
        steps_found=20, sha256="0123456789",
        machine={"device": "NVIDIA H200", "kind": "cuda", "memory_gib": 139.8, "torch": "2.11.0+cu130",
                 "comfyui": "0.30.0", "system": "linux"},
    )  # fmt: skip
    (tmp_path / "pictures").mkdir()
    draw = np.random.default_rng(0).integers(40, 200, (64, 64, 3)).astype(np.uint8)
    for number, job in enumerate(plan.jobs(request.sizes, VARIANTS, 2)):
        place = 0 if job.variant.split else [one.name for one in VARIANTS].index(job.variant.name)
        name, picture = f"{number}.png", draw + (0 if job.variant.name == "Quality" else place)
        picture[0, 0, 0] += job.variant.split
        Image.fromarray(picture).save(tmp_path / "pictures" / name)
        seconds = {FIRST: 9.0, FLOOR: 5.0, TIMED: 4.0 / (place + 1) * (1 + 2 * job.picture)}[job.kind]
        record = {"seconds": seconds, "peak_bytes": 2**30 * (1 + job.picture), "family": "SDXL", "dtype": "float16"}
        record |= {"skipped": 0.25 if job.variant.cache else None, "pictures": [name]}
        journal.add(job.key, record)
    return tmp_path, journal, Request(request.pictures, request.sizes, workflow=None, checkpoint=tmp_path / "m")


def test_numbers_from_made_up_generations(compared):
    out, journal, request = compared
    found = results.summarise(out, journal, request)
    rows = {row["variant"]: row for row in found["results"]}
    balanced = rows["Balanced"]
    assert balanced["seconds"] == pytest.approx((4 + 12) / 3 / 2, abs=1e-3) and balanced["first_seconds"] == 9.0
    assert balanced["speedup"] == pytest.approx(3) and balanced["peak_gib"] == 2.0
    assert balanced["psnr"] == pytest.approx(10 * np.log10(255**2 / 4), abs=1e-3)
    assert rows["EasyCache"]["skipped"] == 0.25 and rows["fewer steps"]["steps"] == 15
    assert rows["Quality"]["psnr"] == schema.SAME
    assert rows[FLOOR_NAME]["psnr"] == pytest.approx(10 * np.log10(255**2 * 64 * 64 * 3), abs=1e-2)
    assert rows[FLOOR_NAME]["seconds"] is None
    assert rows["unmerged"]["psnr"] is None and rows["unmerged"]["speedup"] == 1
    assert schema.problems(found) == []
    text = results.table(found)
    assert "20 (25% skipped)" in text and "the same" in text and "3.00 x" in text and "42.1" in text
    written = results.write(found, out, request)
    assert all(path.is_file() for path in written) and json.loads(written[0].read_text(encoding="utf-8")) == found


def test_a_workflow_whose_loaders_are_not_known_gives_a_result_that_is_taken(compared):
    out, journal, request = compared
    journal.settings["model_files"] = []
    found = results.summarise(out, journal, request)
    assert found["model"]["name"] == "unknown" and schema.problems(found) == []


def test_the_persons_own_prompts_are_not_in_the_json(compared):
    out, journal, request = compared
    assert results.summarise(out, journal, request)["prompts"] == ["a cat"]
    own = Request(request.pictures, request.sizes, request.checkpoint, own_prompts=True)
    found = results.summarise(out, journal, own)
    assert found["prompts"] is None and "a cat" not in json.dumps(found) and str(out) not in json.dumps(found)


def test_it_is_complete_with_the_last_generation_and_not_before(compared):
    out, journal, request = compared
    assert results.is_complete(journal, request)
    journal.records.pop(plan.jobs(request.sizes, VARIANTS, 2)[-1].key)
    assert not results.is_complete(journal, request)
    assert not results.is_complete(Journal(out / "new", {}), request)


def test_lpips_is_measured_where_its_package_is_and_a_failure_names_no_folder(monkeypatch):
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    monkeypatch.setitem(sys.modules, "lpips", None)
    absent = likeness.Lpips()
    assert absent(black, white) is None and absent.why == "the package lpips is not installed"

    class Net:
        def __init__(self, net, verbose):
            assert net == "alex"

        def eval(self):
            return lambda a, b: (a - b).abs().mean()

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Net))
    assert likeness.Lpips()(black, white) == 2 and likeness.Lpips().why == ""

    def fails(**_):
        raise OSError("/home/ada/.cache/torch is full")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=fails))
    assert likeness.Lpips().why == "lpips failed with OSError"


@pytest.mark.parametrize(("low", "high"), [(0, 0.37), (0, 25), (23.5, 60), (59, 60), (0, 1e-9), (0, 4321)])
def test_ticks_span_the_range(low, high):
    made = drawn.ticks(low, high)
    assert made[0] <= low and made[-1] >= high - 1e-9 and 2 <= len(made) <= 9 and len(set(np.diff(made).round(9))) == 1


def test_pictures_keep_their_shape_in_the_sheet():
    wide = np.full((20, 40, 3), 255, np.uint8)
    panel = np.asarray(sheet.enlarge(wide))
    assert panel.shape == (320, 320, 3) and (panel[160, 5] == 255).all() and (panel[5, 160] != 255).any()


# -- before it begins ---------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_installed(monkeypatch):
    def never(*_):
        raise AssertionError("this comes before anything is installed")

    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    monkeypatch.setattr(environment, "ensure", never)


def command(*arguments: str) -> int:
    return run.compare(install.parser().parse_args(["compare", *arguments]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--checkpoint", "absent.safetensors"), "there is no file"),
        (("--sizes", "500"), "--sizes 500"),
        (("--sizes", "64", "128x64"), "--sizes 128x64: the demo's model paints squares of 64 to 256"),
        (("--sizes", "264"), "--sizes 264x264: the demo's model paints"),
        (("--workflow", "absent.json"), "could not be read"),
        (("--prompts", "absent.txt", "--workflow", "flow.json"), "absent.txt could not be read"),
        (("--comfyui", "."), "missing: main.py"),
        (("--out", "flow.json"), "is a file, not a folder"),
        (("--out", "taken"), "is there already and is not from a comparison"),
        (("--out", "begun"), "other settings: sizes"),
    ],
)
def test_bad_input_is_told_before_anything_is_installed(arguments, words, nothing_is_installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_ins.write(tmp_path, {"flow.json": json.dumps(ready()), "taken/compare.json": "mine"})
    (tmp_path / "begun").mkdir()
    Journal(tmp_path / "begun", {"sizes": ["512x512"]}).write_settings()
    before = stand_ins.tree(tmp_path)
    with pytest.raises(SetupError, match=words):
        command(*arguments)
    assert stand_ins.tree(tmp_path) == before


def test_the_command_goes_on_in_the_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stand_ins.write(tmp_path, {"m.ckpt": "", "p.txt": "a cat"})
    monkeypatch.setattr(environment, "ensure", lambda _: tmp_path / "python")
    monkeypatch.setattr(run.comfyui, "locate", lambda *_: tmp_path / "comfyui")
    monkeypatch.setattr(run, "_become", lambda python, command: command)
    made = command("--checkpoint", "m.ckpt", "--prompts", "p.txt", "--sizes", "512", "768x512", "--out", "o")
    assert made[:2] == ["-m", "installer.compare"] and made[-3:] == ["--sizes", "512", "768x512"]
    for name, value in (("comfyui", "comfyui"), ("out", "o"), ("checkpoint", "m.ckpt"), ("prompts", "p.txt")):
        assert made[made.index(f"--{name}") + 1] == str(tmp_path / value)
    assert "--workflow" not in made and not (tmp_path / "o").exists()


def test_help_says_that_a_workflow_runs_whatever_it_names(capsys):
    with pytest.raises(SystemExit):
        install.parser().parse_args(["compare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "A workflow runs whatever nodes it names: use one that you trust." in text
    assert "runs whatever nodes it names, with the custom nodes of --comfyui" in text


def test_the_users_own_models_and_nodes_without_their_tome(tmp_path, monkeypatch):
    from installer import comfyui

    monkeypatch.setattr(comfyui, "CACHE", tmp_path / "cache")
    host = stand_ins.write(tmp_path / "host", {
        "models/loras/a": "", "models/readme.md": "", "custom_nodes/gguf/__init__.py": "",
        "custom_nodes/tome/comfy_tome/nodes.py": "",
    })  # fmt: skip
    made = comfyui.models_of(host, ("ours",))
    assert made[-4:] == ("--disable-all-custom-nodes", "--whitelist-custom-nodes", "ours", "gguf")
    (paths,) = json.loads((tmp_path / "cache/host_paths.yaml").read_text()).values()
    assert paths == {"base_path": str(host), "custom_nodes": "custom_nodes", "loras": "models/loras"}


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--out", ""], ["compare", "--checkpoint", ""], ["compare", "--out="], ["comfyui", ""]],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_default(arguments, capsys):
    """As of a script's variable that is not set."""
    with pytest.raises(SystemExit):
        install.parser().parse_args(arguments)
    assert "the path is empty" in capsys.readouterr().err


def test_help_of_the_tests_installs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(environment, "ensure", pytest.fail)
    with pytest.raises(SystemExit):
        install.main(["test", "--help"])
    assert "--fast" in capsys.readouterr().out
