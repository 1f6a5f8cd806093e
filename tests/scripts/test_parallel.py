"""One picture in two processes (gloo, on the CPU) through diffusers' own context parallelism: the picture of one."""

from __future__ import annotations

import multiprocessing
import os
import traceback

import pytest
import torch

import shared_tome
from shared_tome import ModelCall, ToMeConfig
from shared_tome.autotune import step as step_auto
from shared_tome.autotune import store as store_auto
from shared_tome.autotune.paying import Decision
from shared_tome.scripts import joint_autotune, whole_steps
from shared_tome.scripts.parallel import Shard

from . import dits, models
from .dits import DITS

diffusers = models.diffusers
from diffusers.models._modeling_parallel import ContextParallelOutput

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods() or not torch.distributed.is_gloo_available(),
    reason="two processes of one test need fork, and torch.distributed's gloo",
)

MASK = torch.tensor([[1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0]])


def run_flux(model, grid, rows, reference=4, **told):
    """Six text tokens, and four of a reference behind the image."""
    ids = torch.cat((dits.flux_ids(*grid), torch.tensor([[1.0, 0.0, 0.0]]).expand(reference, 3)))
    return model(
        hidden_states=models.noise(2, len(ids), 8, seed=1), encoder_hidden_states=dits.text(rows, 6),
        pooled_projections=models.noise(2, 8, seed=3), timestep=dits.times(rows, 0.5), img_ids=ids,
        txt_ids=torch.zeros(6, 3), **told,
    )  # fmt: skip


def run_qwen(model, grid, rows, **told):
    return model(
        hidden_states=models.noise(2, grid[0] * grid[1], 8, seed=1), encoder_hidden_states=dits.text(rows, 6),
        encoder_hidden_states_mask=MASK, timestep=dits.times(rows, 0.5), img_shapes=[[(1, *grid)]] * 2, **told,
    )  # fmt: skip


def run_wan(model, grid, rows, **told):
    return model(dits.latent((3, *grid), rows), dits.times(rows, 500.0), dits.text(rows), **told)


def run_ltx(model, grid, rows, **told):
    """Without a mask of the text: diffusers' own attention to it fails with one in two processes."""
    return model(
        models.noise(2, 180, 4, seed=1), dits.text(rows, 6), dits.times(rows, 500.0), None,
        num_frames=3, height=grid[0], width=grid[1], **told,
    )  # fmt: skip


def three_heads():
    return models.seeded(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, joint_attention_dim=16,
            pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), attention_head_dim=16, num_attention_heads=3,
        )
    )  # fmt: skip


MADE = {
    "flux": (models.flux, run_flux),
    "three": (three_heads, run_flux),
    "qwen": (DITS["QwenImage"].model, run_qwen),
    "wan": (DITS["Wan"].model, run_wan),
    "ltx": (DITS["LTXVideo"].model, run_ltx),
}
EVEN = {"ulysses_degree": 2}
ANYTHING = {"ulysses_degree": 2, "ulysses_anything": True}  # 67 tokens and 3 heads for two
# Name: model, the image's grid, how it is shared, options.
CASES = {
    "flux sample": ("flux", (6, 10), EVEN, {"own_token": False}),
    "flux own tokens": ("flux", (6, 10), EVEN, {"ratio": 2 / 3}),
    "flux multires": ("flux", (6, 10), EVEN, {"method": "multires"}),
    "flux merge": ("flux", (6, 10), EVEN, {"method": "merge"}),
    "flux merge_queries": ("flux", (6, 10), EVEN, {"method": "merge_queries"}),
    "flux odd, merge": ("three", (7, 9), ANYTHING, {"method": "merge"}),
    "flux odd, own tokens": ("three", (7, 9), ANYTHING, {"ratio": 2 / 3}),
    "qwen own tokens": ("qwen", (6, 10), EVEN, {}),
    "qwen merge": ("qwen", (6, 10), EVEN, {"method": "merge"}),
    "wan own tokens": ("wan", (6, 10), EVEN, {"ratio": 0.75}),
    "wan multires": ("wan", (6, 10), EVEN, {"method": "multires"}),
    "ltx own tokens": ("ltx", (6, 10), EVEN, {"ratio": 0.75}),
    "wan merge": ("wan", (6, 10), EVEN, {"method": "merge"}),
}


def config(**options):
    return ToMeConfig(**{"ratio": 0.5, "min_tokens": 0, **options})


def measure(name):
    """In one of two processes: the pictures of one and of two, each with and without ToMe, and what was chosen."""
    kind, grid, shared, options = CASES[name]
    make, call = MADE[kind]
    chosen, plan = [], ModelCall.plan

    def spy(self, *args):
        made = plan(self, *args)
        chosen.append(made.groups.clone() if made is not None and self.config.kind.matches else made and made.index)
        return made

    ModelCall.plan = spy

    @torch.no_grad()
    def run(model):
        chosen.clear()
        return call(model, grid, models.ALL, return_dict=False)[0]

    def model():
        made = make()
        for name, weight in made.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                weight.data *= 2
        return made

    one, two = model(), model()
    two.enable_parallelism(config=diffusers.ContextParallelConfig(**shared))
    plain = run(one)
    found = {"plain": float((run(two) - plain).abs().max())}
    for each in (one, two):
        shared_tome.apply_patch(each, config=config(**options))
    alone = run(one)
    choices = list(chosen)
    found["merged"] = float((run(two) - alone).abs().max())
    found["same"] = len(choices) == len(chosen) and all(torch.equal(x, y) for x, y in zip(choices, chosen, strict=True))
    later = shared_tome.apply_patch(model(), config=config(**options))
    later.enable_parallelism(config=diffusers.ContextParallelConfig(**shared))
    found["later"] = float((run(later) - alone).abs().max())
    found["moved"] = float((alone - plain).abs().max())
    found["layers"] = len(choices)
    found["said"] = sorted(two._shared_tome._said)
    ModelCall.plan = plan
    return found


def joined():
    """Flux, shared by the two processes."""
    two = models.flux()
    two.enable_parallelism(config=diffusers.ContextParallelConfig(**EVEN))
    return two


def moved(two, plain, **options):
    """How far two calls in a row of a model are from the unmerged picture; they are alike."""
    shared_tome.apply_patch(two, config=config(own_token=False, **options))
    first, second = (run_flux(two, (6, 10), models.ALL, return_dict=False)[0] for _ in range(2))
    assert torch.equal(first, second)
    return float((first - plain).abs().max())


@torch.no_grad()
def disagreeing(rank):
    """By times that are made up, differing in the processes: merging the first kind of layer pays in both, then in the
    first process alone. How far from the unmerged picture each is, and what each told the other one."""
    found, told, gather = {}, [], Shard.gather
    joint_autotune.measures = lambda *_: True
    Shard.gather = lambda self, numbers: (told.append(list(numbers)), gather(self, numbers))[1]
    for name, pays in (("both", True), ("one", rank == 0)):
        joint_autotune.known_or_measured = lambda *_, pays=pays: Decision(1000.0, 500.0 if pays else 1000.0, 0.0)
        two = joined()
        far = moved(two, run_flux(two, (6, 10), models.ALL, return_dict=False)[0])
        found[name] = far, told[:], sorted(two._shared_tome._said), two._shared_tome.decided.as_text
        told.clear()
    Shard.gather = gather
    return found


@torch.no_grad()
def steps(rank):
    """The same of whole steps, which run in both processes or in none."""
    found, ways, merged, clock = {}, [], [], []
    plan, detached = ModelCall.plan, whole_steps.detached_model
    os.environ[store_auto.FOLDER] = ""  # each process knows what it has measured
    torch.cuda.get_device_name = lambda *_: f"made-up GPU {rank}"

    def counted(self, *given):
        made = plan(self, *given)
        merged.append(made is not None)
        return made

    def seconds(call, device):
        merged.clear()
        call()
        ways.append(sum(merged))
        return clock[0][bool(ways[-1])]

    ModelCall.plan, step_auto.timing.seconds = counted, seconds
    step_auto.timing.seconds_of_one = lambda call, device: call() is None
    joint_autotune.measures = lambda *_: True
    plain = run_flux(joined(), (6, 10), models.ALL, return_dict=False)[0]
    # Name: seconds of a step without and with merging, what the processor needs for an attention of which 500 us are
    # saved; whether this process can measure, and whether its copy of the model can be made.
    cases = {
        "pays": ((0.1, 0.08), 0.0, True, True),
        "slow in one": ((0.1, 0.08 + 0.03 * rank), 0.0, True, True),
        "busy": ((0.2, 0.15), 800.0, True, True),
        "busy, layers pay in one": ((0.2, 0.15), 800.0 * rank, True, True),
        "long in one": ((0.1 + 0.4 * rank, 0.09), 800.0, True, True),
        "not measured in one": ((0.1, 0.11), 0.0, rank == 0, True),
        "no copy in one": ((0.1, 0.11), 0.0, True, rank == 0),
        "known in one": ((0.1, 0.11), 0.0, True, True),
        "known in both": ((0.1, 0.11), 0.0, True, True),
        "set": ((0.1, 0.11), 0.0, True, True),
    }
    for name, (times, cost, measures, copies) in cases.items():
        if name != "known in both":
            store_auto._decided.clear()
        if name == "known in one" and rank == 1:
            store_auto.store_of(torch.device("cpu"))._known = dict.fromkeys(found["keys"], Decision(100.0, 50.0, 0.0))
        step_auto.may_measure = lambda device, measures=measures: measures
        whole_steps.detached_model = detached if copies else lambda *_: None
        joint_autotune.known_or_measured = lambda *_, cost=cost: Decision(1000.0, 500.0, cost)
        two, clock[:] = joined(), [times]
        ways.clear()
        far = moved(two, plain, **({"decisions": "-6x10"} if name == "set" else {}))
        found[name] = far, ways[:], sorted(two._shared_tome._said), two._shared_tome.decided.text
        if name == "busy":
            found["keys"] = list(store_auto.store_of(torch.device("cpu"))._known)
    ModelCall.plan, whole_steps.detached_model = plan, detached
    return found


@torch.no_grad()
def failing(rank):
    """What becomes of both where one process fails in the midst of a step that is timed."""
    store_auto._decided.clear()
    step_auto.may_measure = lambda device: True
    calls = []

    def seconds(call, device):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        call()
        return 0.1

    step_auto.timing.seconds = seconds
    two = shared_tome.apply_patch(joined(), config=config(own_token=False))
    try:
        run_flux(two, (6, 10), models.ALL, return_dict=False)
    except Exception as error:
        return type(error).__name__, len(calls), two._shared_tome.call
    return "went on", len(calls), None


def refused():
    """What is said of other ways to share a model, before and after it is patched."""
    found = {}
    ring, own = diffusers.ContextParallelConfig(ring_degree=2), {"proj_out": ContextParallelOutput(1, 3)}
    for name, make, told in (("ring", models.flux, {}), ("plan", models.sd3, {"cp_plan": own})):
        made = {"config": ring if name == "ring" else diffusers.ContextParallelConfig(**EVEN), **told}
        model = make()
        model.enable_parallelism(**made)
        try:
            shared_tome.apply_patch(model, config=config())
        except ValueError as error:
            found[name] = str(error), models.count_hooks(model)
        model = shared_tome.apply_patch(make(), config=config())
        model.enable_parallelism(**made)
        for _ in range(2):
            try:  # what diffusers makes of it without ToMe: an error, or another picture
                (models.run_flux if name == "ring" else models.run_sd3)(model)
            except Exception:
                traceback.print_exc()
        found[f"{name} later"] = sorted(model._shared_tome._said), model._shared_tome.call
    return found


def gather(parts, x, group=None):
    """torch.distributed's, for parts of different sizes too, which gloo lacks."""
    for rank, part in enumerate(parts):
        if rank == torch.distributed.get_rank(group):
            part.copy_(x)
        torch.distributed.broadcast(part, src=rank, group=group)


def work(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # What diffusers asks for the device: here the CPU, which counts as none.
    torch._C._get_accelerator, torch.accelerator.device_count = lambda: torch.device("cpu"), lambda: 1
    torch.distributed.all_gather = gather
    made = {}
    others = {"refused": refused, "disagreeing": lambda: disagreeing(rank), "steps": lambda: steps(rank)}
    others["failing"] = lambda: failing(rank)  # the last: the two are no longer in step
    for name in (*CASES, *others):
        try:
            made[name] = others[name]() if name in others else measure(name)
        except Exception:
            made[name] = traceback.format_exc()
    results.put((rank, made))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the two processes found, by rank and by case."""
    store, context = tmp_path_factory.mktemp("gloo") / "store", multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=work, args=(rank, store, results), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        yield dict(results.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(5)
            process.kill()


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_picture_of_one(name, both):
    for rank in (0, 1):
        found = both[rank][name]
        assert isinstance(found, dict), found
        assert found["plain"] < 2e-5 and found["merged"] < 2e-5 and found["later"] < 2e-5
        assert found["moved"] > 1e-3 and found["layers"] > 1
        assert found["same"], "the choices of one process"
        assert found["said"] == []


def test_a_layer_is_merged_where_that_pays_in_both_processes(both):
    for rank in (0, 1):
        found = both[rank]["disagreeing"]
        assert isinstance(found, dict), found
        step = [False, False, 0.0, 0.0, 0.0, 0.0]  # which no process can measure
        far, told, said, decided = found["both"]
        assert far > 1e-3 and told == [step, [True, True]] and said == []
        assert decided == "Decisions: +6x10 +6x10/32/2/256"
        far, told, said, decided = found["one"]
        assert far < 2e-5 and told == [step, [rank == 0] * 2]
        why = "merging does not pay here" if rank else "merging does not pay in another of the processes that share"
        assert len(said) == 1 and said[0].startswith(why)
        assert decided == "Decisions: +6x10 -6x10/32/2/256"


LAYERS = " +6x10/32/2/256"


@pytest.mark.parametrize(
    ("name", "decided", "ways"),
    [
        ("pays", "+6x10" + LAYERS, [0, *[3, 0] * 4]),
        ("slow in one", "-6x10", [0, *[3, 0] * 4]),
        ("busy", "+6x10" + LAYERS, [0, *[3, 0, 0] * 4]),
        ("busy, layers pay in one", "+6x10" + LAYERS, [0, *[3, 0, 0] * 4]),
        ("long in one", "+6x10" + LAYERS, [0]),
        ("not measured in one", "+6x10" + LAYERS, []),
        ("no copy in one", "+6x10" + LAYERS, []),
        ("known in one", "+6x10" + LAYERS, []),
        ("known in both", "+6x10" + LAYERS, []),
        ("set", "-6x10", []),
    ],
)
def test_both_processes_run_the_same_steps_and_decide_alike(both, name, decided, ways):
    for rank in (0, 1):
        found = both[rank]["steps"]
        assert isinstance(found, dict), found
        far, ran, said, text = found[name]
        assert (text, ran) == (decided, ways)
        assert (far > 1e-3) if decided.startswith("+") else far == 0
        assert said == []
        assert len(found["keys"]) == 1 and ", in 2 processes, " in found["keys"][0]


def test_a_process_that_fails_in_a_step_says_so_and_does_not_go_on(both):
    """Its next call would meet the other one's step. When it ends, the other one's call fails as well."""
    assert both[1]["failing"] == ("OutOfMemoryError", 3, None)
    error, calls, call = both[0]["failing"]
    assert error not in ("went on", "OutOfMemoryError") and calls == 3 and call is None


def test_other_ways_to_share_a_model_are_refused_by_name(both):
    for rank in (0, 1):
        found = both[rank]["refused"]
        assert isinstance(found, dict), found
        ring = "FluxTransformer2DModel has ring attention (ring_degree=2), which does not call torch's attention"
        plan = "SD3Transformer2DModel has a cp_plan that is not diffusers' own: in what order its tokens meet"
        for name, reason in (("ring", ring), ("plan", plan)):
            text, hooks = found[name]
            assert text.startswith(reason) and hooks == 0
            said, call = found[f"{name} later"]
            assert said == [f"{text}; nothing is merged"] and call is None


def test_a_tensor_parallel_model_is_refused_by_name(caplog):
    """Its own objects; diffusers itself shares a model so on GPUs alone."""
    config_of = diffusers.ParallelConfig(tensor_parallel_config=diffusers.TensorParallelConfig(tp_degree=2))
    model = models.flux()
    before = models.run_flux(model)
    shared_tome.apply_patch(model, config=config())
    model._parallel_config = config_of
    assert torch.equal(models.run_flux(model), before) and torch.equal(models.run_flux(model), before)
    says = "FluxTransformer2DModel is tensor-parallel: each process has the keys of some heads alone"
    assert [record.message for record in caplog.records] == [f"[ToMe] {says}; nothing is merged"]
    shared_tome.remove_patch(model)
    with pytest.raises(ValueError, match=says):
        shared_tome.apply_patch(model, config=config())
    assert models.count_hooks(model) == 0
