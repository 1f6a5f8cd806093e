"""levels "auto" on a GPU: what is measured, kept and decided. The GPU's own times: tests/gpu."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.made_up_gpu import MadeUpGPU
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared_tome import METHODS, ModelCall, kernels
from shared_tome.attention.sequence import JointCall
from shared_tome.autotune import decisions, store, surroundings, timing
from shared_tome.autotune import layer as auto
from shared_tome.autotune.layer import Case
from shared_tome.autotune.paying import Decision, Given, Judge
from shared_tome.autotune.store import DecisionStore
from shared_tome.autotune.verdicts import Verdict

from .helpers import config, tokens

GRID = (6, 8)
PAYS, COSTS = Decision(100.0, 60.0, 10.0), Decision(100.0, 98.0, 10.0)


def case(**changes):
    known = {"grid": GRID, "channels": 16, "heads": 2, "dtype": torch.float16, "config": config()}
    return Case(**{**known, **changes})


@pytest.mark.parametrize(
    ("full", "merged", "cpu", "eager", "compiled"),
    [
        (100, 60, 10, True, True),
        (100, 60, 50, False, True),  # it saves 40 and takes the processor 50
        (100, 98, 0, False, False),  # within what scatters
        (100, 120, 0, False, False),
        (1000, 500, 300, True, True),
    ],
)
def test_what_pays(full, merged, cpu, eager, compiled):
    decision = Decision(full, merged, cpu)
    assert (decision.pays(), decision.pays(waits=False)) == (eager, compiled)
    assert f"saves {full - merged:.0f} of {full:.0f} us" in decision.reason


@pytest.mark.parametrize(
    ("block", "block_cpu", "eager"),
    [(900, 700, True), (900, 895, False), (900, 1400, False), (900, 889, True)],
)
def test_a_block_that_waits_for_the_processor_gains_nothing(block, block_cpu, eager):
    """Merged it takes the processor 10 us more: too long where the GPU is done with the unmerged one by then."""
    decision = Decision(100.0, 60.0, 10.0, block, block_cpu)
    assert (decision.pays(), decision.pays(waits=False)) == (eager, True)
    assert eager or f"a block takes the processor {block_cpu} us and the GPU {block}" in decision.reason
    assert "saves -20 of 100 us" in Decision(100.0, 120.0, 10.0, block, block_cpu).reason


def test_a_judge_goes_by_what_its_steps_wait_for():
    """And knows whether that decided about a layer that it met."""
    waiting, paying, costly = Decision(100.0, 60.0, 50.0), PAYS, COSTS
    for found, matters in ((None, False), (Given(False), False), (paying, False), (costly, False), (waiting, True)):
        judge = Judge()
        judge.meet(found)
        assert judge.matters == matters
        judge.meet(paying)
        assert judge.matters == matters
    assert Judge().why_not_paid(waiting) == waiting.reason and Judge(waits=False).why_not_paid(waiting) is None
    assert [judge.why_not_paid(costly) for judge in (Judge(), Judge(waits=False))] == [costly.reason] * 2
    assert [Verdict(step).judge.waits for step in (None, Given(True), PAYS, Decision(9.0, 1.0, 0.0, busy=True))] == [
        True, True, True, False
    ]  # fmt: skip


def test_a_call_judges_as_its_step_says(monkeypatch, decided):
    """Also where it is known before the call that nothing is merged."""
    waiting, ours, cpu = Decision(100.0, 60.0, 50.0), config(), torch.device("cpu")
    monkeypatch.setattr(decisions, "decision_on", lambda *_: waiting)
    monkeypatch.setattr(decisions, "known_on", lambda *_: waiting)
    for judge, why in ((None, waiting.reason), (Judge(), waiting.reason), (Judge(waits=False), None)):
        layers = decisions.Decisions(ModelCall(ours, GRID, cpu), judge=judge)
        assert layers.why_not_paid(layers.decision(tokens(2, GRID, 16), GRID, 2)) == why
        given = ours, GRID, cpu, [(0, 16, 2)], torch.float32
        found = decisions.why_layers_left_alone(*given, judge=judge)
        assert found == (None if why is None else {GRID: why})
        assert judge is None or judge.matters


def test_the_block_is_timed_on_tokens_of_its_own(monkeypatch):
    times = iter([(100.0, 20.0), (60.0, 25.0), (900.0, 400.0)])
    monkeypatch.setattr(timing, "times_of", lambda call, device, *_: call() is not None and next(times))
    given = []

    def block(x):
        given.append(x)
        return lambda: x.add_(1)

    ours = case(dtype=torch.float32)
    assert auto.measure(ours, torch.device("cpu"), None, block) == Decision(100.0, 60.0, 5.0, 900.0, 400.0)
    assert given[0].shape == (2, 48, 16)
    times = iter([(100.0, 20.0), (60.0, 25.0)])
    assert auto.measure(ours, torch.device("cpu"), None, lambda x: None) == Decision(100.0, 60.0, 5.0)


def test_it_is_measured_once_and_kept(tmp_path):
    path = tmp_path / "folder" / "gpu.json"
    calls = []

    def measured(decision):
        calls.append(decision)
        return decision

    first = DecisionStore(path)
    assert first.get("a", lambda: measured(PAYS)) == PAYS
    assert first.get("a", lambda: measured(COSTS)) == PAYS
    assert DecisionStore(path).get("a", lambda: measured(COSTS)) == PAYS
    assert len(calls) == 1
    assert not list(path.parent.glob("*.tmp"))
    busy = Decision(100.0, 60.0, 0.0, busy=True)
    first.get("b", lambda: busy)
    assert DecisionStore(path).get("b", lambda: PAYS) == busy and '"busy": true' in path.read_text()


def test_two_processes_share_the_file(tmp_path):
    one, other = (DecisionStore(tmp_path / "gpu.json") for _ in range(2))
    one.get("a", lambda: PAYS)
    other.get("b", lambda: COSTS)
    one.get("c", lambda: PAYS)
    assert set(json.loads(one.path.read_text())["layers"]) == {"a", "b", "c"}


DAMAGED = tuple(
    text.replace("FORM", str(store.FORM))
    for text in (
        "",
        "{",
        "[]",
        "null",
        '{"form": FORM}',
        '{"form": FORM, "layers": {"a": {"full_us": 1}}}',
        '{"form": FORM, "layers": {"a": {"full_us": 1, "merged_us": "x", "cpu_us": 0}}}',
        '{"form": FORM, "layers": {"a": {"full_us": 1, "merged_us": NaN, "cpu_us": 0}}}',
        '{"form": FORM, "layers": 5}',
    )
)


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_ignored_and_rewritten(tmp_path, caplog, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "ToMe"):
        assert DecisionStore(path).get("a", lambda: COSTS) == COSTS
    assert "is damaged" in caplog.text
    assert DecisionStore(path).get("a", lambda: PAYS) == COSTS


def test_a_file_of_another_form_is_rewritten(tmp_path, caplog):
    path = tmp_path / "gpu.json"
    path.write_text('{"form": 99, "layers": {"a": {"full_us": 1, "merged_us": 2, "cpu_us": 0}}}')
    assert DecisionStore(path).get("a", lambda: PAYS) == PAYS
    assert json.loads(path.read_text())["form"] == store.FORM
    assert not caplog.text


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    kept = DecisionStore(tmp_path / "file" / "gpu.json")
    assert kept.get("a", lambda: PAYS) == PAYS
    assert kept.get("b", lambda: COSTS) == COSTS
    assert kept.get("a", lambda: COSTS) == PAYS
    assert caplog.text.count("cannot be kept") == 1


def test_nothing_to_keep():
    kept = DecisionStore(None)
    assert kept.get("a", lambda: PAYS) == PAYS
    assert kept.get("a", lambda: COSTS) == PAYS


def test_what_cannot_be_measured_is_merged(tmp_path, caplog, monkeypatch):
    kept, tries = DecisionStore(tmp_path / "gpu.json"), []

    def fails():
        tries.append(1)
        raise RuntimeError("no such heads")

    assert kept.get("a", fails) is None
    assert kept.get("a", fails) is None
    assert len(tries) == 1 and "no such heads" in caplog.text
    assert not kept.path.exists()
    call, x = ModelCall(config(), GRID, torch.device("cpu")), tokens(2, GRID, 16)
    layers = decisions.Decisions(call)
    monkeypatch.setattr(auto, "store_of", lambda device: kept)
    monkeypatch.setattr(auto, "measure", lambda *_: fails())
    monkeypatch.setattr("shared_tome.autotune.decisions.measures", lambda *_: True)
    assert layers.why_not_paid(layers.decision(x, GRID, 2)) is None and len(tries) == 2
    monkeypatch.setattr(decisions, "decision_on", lambda *_: COSTS)
    layers = decisions.Decisions(call)
    assert layers.why_not_paid(layers.decision(x, GRID, 2)) == COSTS.reason  # the counterpart


def test_threads_measure_once():
    kept, calls, together = DecisionStore(None), [], threading.Barrier(4)

    def measured():
        calls.append(1)
        return PAYS

    def run():
        together.wait()
        kept.get("a", measured)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_what_tells_layers_apart():
    same = [case(), case(config=config(seed=5)), case(config=config(start=0.5, min_tokens=7))]
    assert len({one.key for one in same}) == 1
    other = [
        case(),
        case(grid=(8, 6)),
        case(channels=32),
        case(heads=4),
        case(dtype=torch.bfloat16),
        case(attention="sage"),
        case(about="weights float8_e4m3fn"),
        case(config=config(ratio=0.25)),
        case(config=config(proportional=False)),
        case(config=config(method="merge_keys")),
        case(config=config(stride=(4, 2))),
        case(config=config(partition="random")),
        case(config=config(reduce="pick")),
        case(config=config(share_match=True)),
    ]
    assert len({one.key for one in other}) == len(other)


def test_own_tokens_tell_layers_apart():
    """Only where the options keep them and the adapter can."""
    keeps, without = (config(method="sample", own_token=own) for own in (True, False))
    plain = case(config=without)
    assert case(config=keeps).key == plain.key and not case(config=keeps).keeps_self
    flash = case(config=without, kernels=("flash",))
    for same in (case(config=keeps.replace(proportional=False), kernels=("flash",)), flash):
        assert not same.keeps_self and "own" not in same.key
    merges = [case(config=config(own_token=own), kernels=("flash",)).key for own in (True, False)]
    assert merges[0] == merges[1]  # merge keeps none
    own = case(config=keeps, kernels=("flash",))
    assert own.keeps_self and own.key == flash.key + ", own"


def test_the_order_of_kernels_tells_layers_apart():
    """What merging saves depends on how fast the attention is that it spares."""
    orders = ((), ("flash",), ("cudnn", "flash"), ("flash", "cudnn"))
    keys = [case(kernels=order).key for order in orders]
    assert len(set(keys)) == len(orders) and ", torch cudnn flash, " in keys[2]


def test_torchs_own_attention_is_told_by_the_kernels_that_are_on():
    every = auto.name_of(None, torch.device("cpu"))
    assert every == "torch flash mem_efficient cudnn"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        assert auto.name_of(None, torch.device("cpu")) == "torch mem_efficient"
    if hasattr(torch._C, "_get_sdp_priority_order"):
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            assert auto.name_of(None, torch.device("cpu")) == "torch cudnn flash"
    assert (
        auto.name_of(None, torch.device("cpu")) == every
        and auto.name_of(auto.torch_attention, torch.device("cpu")) == "shared_tome.autotune.layer.torch_attention"
    )


def test_which_layers_are_measured(monkeypatch):
    monkeypatch.delenv(auto.SWITCH, raising=False)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert auto.measures(config(), GRID, gpu)
    assert not auto.measures(config(), GRID, cpu)
    assert not auto.measures(config(levels="0"), GRID, gpu)
    assert auto.measures(config(), (127, 129), gpu)
    assert not auto.measures(config(), (128, 128), gpu)
    monkeypatch.setenv(auto.SWITCH, "0")
    assert not auto.measures(config(), GRID, gpu)


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv(store.FOLDER, str(tmp_path))
    assert store.folder() == tmp_path
    monkeypatch.setenv(store.FOLDER, "")
    assert store.folder() is None
    monkeypatch.delenv(store.FOLDER)
    assert store.folder().name == "tome"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.6, 0.75, 0.01])
def test_both_ways_are_run(monkeypatch, method, ratio):
    """As an adapter runs them: projections, weights of keys, the way back."""
    outputs = []

    def times_of(call, device, *_):
        outputs.append(call())
        return (100.0, 20.0) if len(outputs) == 1 else (60.0, 25.0)

    monkeypatch.setattr(timing, "times_of", times_of)
    asked = []

    def attention(q, k, v, heads, scale=None):
        asked.append((q.shape, k.shape, heads))
        return auto.torch_attention(q, k, v, heads, scale)

    state = torch.get_rng_state()
    ours = case(config=config(method=method, ratio=ratio), dtype=torch.float32)
    assert auto.measure(ours, torch.device("cpu"), attention) == Decision(100.0, 60.0, 5.0)
    assert torch.equal(state, torch.get_rng_state())
    assert [out.shape for out in outputs] == [(2, 48, 16)] * 2
    (full, _, heads), (queries, keys, _) = asked
    assert full == (2, 48, 16) and heads == 2
    merged = METHODS[method]
    goes = int(48 * ratio)
    assert queries[1] == (48 - goes if merged.queries else 48)
    assert keys[1] == (48 - goes if merged.keys else 48)


@pytest.mark.parametrize("ratio", [0.6, 0.75, 0.01])
@pytest.mark.parametrize("joins", [True, False], ids=["joined", "no kernel joins"])
def test_both_ways_are_run_with_own_tokens(monkeypatch, ratio, joins):
    """The merged way is the one of JointCall with whole projections, or what an adapter does where that cannot be."""
    outputs, asked, joined = [], [], []

    def times_of(call, device, *_):
        outputs.append(call())
        return (100.0, 20.0) if len(outputs) == 1 else (60.0, 25.0)

    def attention(q, k, v, heads, scale=None):
        asked.append(k.shape[1])
        return auto.torch_attention(q, k, v, heads, scale)

    attend = JointCall.attend

    def spied(self, q, k, v, start, plan, scale=None):
        joined.append((q.shape, k.shape, v.shape, start, plan.kept, self.keeps_self))
        return attend(self, q, k, v, start, plan, scale) if joins else None

    monkeypatch.setattr(timing, "times_of", times_of)
    monkeypatch.setattr(JointCall, "attend", spied)
    options = config(method="sample", ratio=ratio, own_token=True)
    ours = case(config=options, dtype=torch.float32, kernels=("flash",))
    assert auto.measure(ours, torch.device("cpu"), attention) == Decision(100.0, 60.0, 5.0)
    kept = 48 - int(48 * ratio)
    if kept == 48:  # nothing is drawn: the layer is whole both times
        assert not joined and asked == [48, 48]
        return
    assert joined == [((2, 2, 48, 8),) * 3 + (0, kept, True)]
    assert asked == [48] if joins else asked == [48, kept]
    assert [out.shape for out in outputs] == [(2, 48, 16)] * 2 and not torch.equal(*outputs)


def test_how_many_steps_and_rows_there_are_changes_nothing(monkeypatch):
    """A picture in a batch, or with its rows on two GPUs, is the one that it is alone."""
    seen = []
    monkeypatch.setattr(auto, "measure", lambda case, *_: seen.append(case) or PAYS)
    kept = DecisionStore(None)
    monkeypatch.setattr(auto, "store_of", lambda device: kept)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    ours, cpu = config(start=0.4, min_tokens=100, seed=3), torch.device("cpu")
    for options in (ours, ours.replace(start=0.0, seed=1)):
        assert auto.decision_on((64, 64), 640, 10, torch.float16, cpu, options) == PAYS
    (only,) = seen
    assert only.config == config(min_tokens=0)


@pytest.fixture
def decided(monkeypatch):
    """Measuring on the CPU, with a decision of the test's choice by channels."""
    asked = []

    def decision_on(grid, channels, heads, dtype, device, ours, attention=None, kernels=(), block=None, about=""):
        asked.append((grid, channels, heads, dtype, attention, kernels))
        return {16: PAYS, 8: COSTS}.get(channels)

    monkeypatch.setattr(decisions, "measures", lambda ours, grid, device: ours.levels == "auto")
    monkeypatch.setattr(decisions, "decision_on", decision_on)
    return asked


def made(about="", **options):
    """The decisions of a new call."""
    return decisions.Decisions(ModelCall(config(**options), GRID, torch.device("cpu")), about)


def test_a_call_asks_once_a_shape(decided):
    layers = made()
    paid, unpaid, unknown = (tokens(2, GRID, channels) for channels in (16, 8, 4))
    for _ in range(2):
        assert layers.why_not_paid(layers.decision(paid, GRID, 2)) is None
        assert layers.why_not_paid(layers.decision(unpaid, GRID, 2)) == COSTS.reason
        assert layers.why_not_paid(layers.decision(unknown, GRID, 2)) is None
    assert len(decided) == 3
    assert layers.decision(tokens(2, GRID, 12), GRID, None) is None  # a host that tells no heads
    named = made(levels="0")
    assert named.decision(unpaid, GRID, 2) is None
    assert len(decided) == 3


def test_a_call_hands_the_kernels_on(decided):
    layers = made()
    layers.decision(tokens(2, GRID, 16), GRID, 2, None, ("flash",))
    layers.look_ahead([(0, 8, 2)], torch.float32, None, ("cudnn",))
    assert [one[5] for one in decided] == [("flash",), ("cudnn",)]


def test_a_compiled_graph_is_looked_ahead_of(decided):
    """Nothing can be measured in it; launches are not waited for there."""
    ahead = made("weights float32", min_tokens=20)
    ahead.look_ahead([(0, 8, 2), (0, 16, 2), (1, 8, 2)], torch.float32)
    assert [one[:2] for one in decided] == [(GRID, 8), (GRID, 16)]  # level 1 has 12 tokens
    assert ahead.unpaid == ((GRID, 8, 2, torch.float32, ()),)

    def layer(x, layers):
        return x if layers.why_not_paid(layers.decision(x, GRID, 2)) is None else -x

    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for channels, kept in ((16, True), (8, False), (4, True)):
        x = tokens(2, GRID, channels)
        assert torch.equal(compiled(x, ahead), x if kept else -x)
    assert len(decided) == 2
    torch._dynamo.reset()


def test_layers_of_other_heads_or_kernels_are_others(monkeypatch):
    """Also where grid and channels are the same."""
    asked = []

    def decision_on(grid, channels, heads, dtype, device, ours, attention, kernels, block=None, about=""):
        asked.append((heads, dtype, kernels, about))
        return PAYS if heads == 2 and not kernels else COSTS

    monkeypatch.setattr(decisions, "measures", lambda *_: True)
    monkeypatch.setattr(decisions, "decision_on", decision_on)
    ours, x = made("fp8"), tokens(2, GRID, 16)
    for _ in range(2):
        assert ours.decision(x, GRID, 2) == PAYS
        assert ours.decision(x, GRID, 4) == COSTS
        assert ours.decision(x, GRID, 2, None, ("flash",), about=lambda: "fp16") == COSTS
        assert ours.decision(x.half(), GRID, 2) == PAYS
    single, half, flash = torch.float32, torch.float16, ("flash",)
    assert asked == [(2, single, (), "fp8"), (4, single, (), "fp8"), (2, single, flash, "fp16"), (2, half, (), "fp8")]


def test_the_log_says_where_a_layer_pays(gpu, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ToMe")
    for found, said in (
        (PAYS, "pays, measured"),
        (COSTS, "does not pay, measured"),
        (Decision(100.0, 60.0, 50.0), "pays where the GPU is busy, measured"),
        (Decision(100.0, 60.0, 0.0, busy=True), "0 of the processor; the GPU is busy all the time"),
    ):
        gpu.clear()
        caplog.clear()
        monkeypatch.setattr(auto, "measure", lambda *_, found=found: found)
        ask()
        assert said in caplog.text


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Its layers take no time; the store is the real one."""
    monkeypatch.setattr(auto, "measure", lambda *_: PAYS)
    return MadeUpGPU(monkeypatch, tmp_path, store)


def ask(**changes):
    given = {"grid": GRID, "channels": 16, "heads": 2, "dtype": torch.float16, "config": config(), **changes}
    return auto.decision_on(device=torch.device("cpu"), **given)


def test_a_layer_by_itself_is_not_one_in_its_block(gpu):
    """A compiled model is measured before there are blocks; a decision with its block's times is another."""
    ask()
    assert auto.known_on(GRID, 16, 2, torch.float16, torch.device("cpu"), config()) is None
    ask(block=lambda x: None)
    assert auto.known_on(GRID, 16, 2, torch.float16, torch.device("cpu"), config()) == PAYS
    assert len(gpu.kept) == 2


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch.backends.cudnn, "benchmark", True),
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cuda.matmul, "allow_tf32", True),
        (torch.version, "cuda", "99.9"),
        (torch.version, "hip", "9.9"),
        (surroundings, "SOURCE", "of another ToMe"),
        (torch.backends.cudnn, "version", lambda: 99999),
        (kernels, "version", lambda: None),
        (kernels, "version", lambda: "99.9"),
        (surroundings, "_PACKAGES", ("torch",)),
    ],
)
def test_what_a_machine_runs_is_part_of_each_name(gpu, monkeypatch, owner, name, value):
    monkeypatch.setattr(kernels, "version", lambda: "3.0")
    ask()
    before = getattr(owner, name)
    surroundings._versions.cache_clear()
    try:
        setattr(owner, name, value)  # some of torch's switches cannot be taken back by monkeypatch
        ask()
    finally:
        setattr(owner, name, before)
        surroundings._versions.cache_clear()
        assert len(set(gpu.keys)) == len(gpu.kept) == 2


def test_autocast_is_part_of_each_name(gpu):
    ask()
    with torch.autocast("cpu", torch.bfloat16):
        ask()
    assert len(gpu.kept) == 2 and gpu.keys[1].endswith("autocast bfloat16")


SOURCES = """
import sys
def source():
    for name in [name for name in sys.modules if name.partition(".")[0] == "shared_tome"]:
        del sys.modules[name]
    from shared_tome.autotune import surroundings
    return surroundings.__file__, surroundings.SOURCE
print(*source())
for file in sys.argv[1:]:
    open(file, "a").write(chr(10) + "# another")
    print(*source())
"""


def test_another_source_is_another_version(tmp_path):
    """Of kernels and of the rule alike, told without anybody counting it up."""
    core = Path(surroundings.__file__).parents[1]
    shutil.copytree(core, tmp_path / "shared_tome", ignore=shutil.ignore_patterns("__pycache__"))
    files = [f"shared_tome/{name}" for name in ("kernels/impl/mean.py", "autotune/paying.py", "step_auto.py")]
    command = [sys.executable, "-c", SOURCES, *files]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    where, found = zip(*map(str.split, said.splitlines()), strict=True)
    assert {Path(file).parents[2].resolve() for file in where} == {tmp_path.resolve()}
    assert found[0] == surroundings.SOURCE and len(surroundings.SOURCE) == 12
    assert len(set(found)) == 4


def test_two_attentions_of_one_name_are_two():
    def attention(q, k, v, heads, scale=None):
        return q

    other = type("attention", (), {"__call__": lambda self, q, k, v, heads, scale=None: q})()
    names = {auto.name_of(one, torch.device("cpu")) for one in (attention, other, auto.torch_attention)}
    assert len(names) == 3


def test_the_order_of_kernels_is_asked_for_again_after_a_lack_of_memory(monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    auto.put_in_order.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_fused_sdp_choice", full)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            auto.put_in_order(torch.device("cpu"))
    auto.put_in_order(torch.device("cpu"))
    assert auto.put_in_order.cache_info().currsize == 1
    auto.put_in_order.cache_clear()
