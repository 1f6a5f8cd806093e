"""A GPU made up on the CPU: what is measured goes through the real store, into a folder of the test's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


class MadeUpGPU:
    """keys: what was asked for. store: autotune.store of the package under test, which hosts load under names of their
    own."""

    def __init__(self, monkeypatch: Any, folder: Path, store: Any):
        self.keys: list[str] = []
        self._folder, self._store, get = folder, store, store.DecisionStore.get

        def asked(decided: Any, key: str, measured: Any) -> Any:
            self.keys.append(key)
            return get(decided, key, measured)

        monkeypatch.setenv(store.FOLDER, str(folder))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "made-up GPU")
        monkeypatch.setattr(store, "_decided", {})
        monkeypatch.setattr(store.DecisionStore, "get", asked)

    @property
    def kept(self) -> dict[str, dict[str, float]]:
        """What stands in the file."""
        (file,) = self._folder.glob("made-up_GPU*.json")
        return json.loads(file.read_text(encoding="utf-8"))["layers"]

    def forget(self) -> None:
        """As in another process: what is known is read again."""
        self._store._decided.clear()

    def clear(self) -> None:
        """Nothing is known."""
        self.forget()
        for file in self._folder.glob("*.json"):
            file.unlink()


class MadeUpTimes(MadeUpGPU):
    """A GPU that has times for the layers on each grid. layer: autotune.layer, decisions: autotune.decisions of the
    package under test.

    pays: by grid, whether merging saves half of such a layer; of others it does.
    """

    def __init__(self, monkeypatch: Any, folder: Path, store: Any, layer: Any, decisions: Any):
        super().__init__(monkeypatch, folder, store)
        self.pays: dict[tuple[int, ...], bool] = {}

        def measure(case: Any, *_: Any) -> Any:
            return layer.Decision(80.0, 40.0 if self.pays.get(case.grid, True) else 79.0, 0.0)

        monkeypatch.setattr(layer, "measure", measure)
        monkeypatch.setattr(decisions, "measures", lambda config, grid, device: config.levels == "auto")

    def another(self, **pays: bool) -> None:
        """Another GPU, of which nothing is known yet. pays: by grid, as x16x8=False."""
        self.clear()
        self.keys.clear()
        self.pays = {tuple(map(int, name[1:].split("x"))): did for name, did in pays.items()}


class StepTimes:
    """Steps take the longer of the GPU's time and the processor's, by what is merged in them.

    gpu_ms, cpu_ms: of an unmerged step; saves_ms, costs_ms: of one merged layer, on the GPU and of the processor.
    merged: what was merged since a step was timed, an entry a layer. ways: of each step that was timed, how it was run;
    outs: what it gave.
    """

    gpu_ms, cpu_ms, saves_ms, costs_ms = 100.0, 95.0, 5.0, 8.0

    def time_steps(self, monkeypatch: Any, step: Any) -> None:
        """step: autotune.step of the package under test."""
        self.merged: list[Any] = []
        self.ways: list[Any] = []
        self.outs: list[Any] = []
        monkeypatch.setattr(step, "may_measure", lambda device: True)
        monkeypatch.setattr(step.timing, "seconds_of_one", lambda call, device: call() is None)
        monkeypatch.setattr(step.timing, "seconds", self._seconds)

    @property
    def way(self) -> Any:
        """How the step that ends now was run."""
        return len(self.merged)

    @property
    def steps(self) -> list[str]:
        """The steps that were asked for."""
        return [key for key in self.keys if key.startswith("a step")]

    def _seconds(self, call: Any, device: Any) -> float:
        self.merged.clear()
        self.outs.append(call())
        self.ways.append(self.way)
        count = len(self.merged)
        return 1e-3 * max(self.gpu_ms - count * self.saves_ms, self.cpu_ms + count * self.costs_ms)


class MadeUpSteps(StepTimes, MadeUpTimes):
    """A GPU that has times for the steps of U-Nets and for their layers.

    waiting: grids of layers in whose blocks the processor takes longer than the GPU. merged: the grids of layers; a way
    is the smallest that was merged.
    """

    gpu_ms, cpu_ms, costs_ms = 200.0, 100.0, 1.0

    def __init__(self, monkeypatch: Any, folder: Path, store: Any, layer: Any, decisions: Any, step: Any):
        super().__init__(monkeypatch, folder, store, layer, decisions)
        self.waiting: set[tuple[int, ...]] = set()
        attention = decisions.ModelCall.attention

        def counted(call: Any, q: Any, k: Any, v: Any, grid: tuple[int, ...], **given: Any) -> Any:
            made = attention(call, q, k, v, grid, **given)
            self.merged += [] if made is None else [grid]
            return made

        def measure(case: Any, *_: Any) -> Any:
            saves = 1e3 * self.saves_ms if self.pays.get(case.grid, True) else 0.0
            block_cpu = 5e4 if case.grid in self.waiting else 1e3
            return layer.Decision(2e4, 2e4 - saves, 1e3 * self.costs_ms, 4e4, block_cpu)

        monkeypatch.setattr(decisions.ModelCall, "attention", counted)
        monkeypatch.setattr(layer, "measure", measure)
        self.time_steps(monkeypatch, step)

    @property
    def way(self) -> str:
        least = min(self.merged, default=None)
        return "whole" if least is None else f"from {'x'.join(map(str, least))}"


class MadeUpTransformers(StepTimes, MadeUpGPU):
    """A GPU that has times for the steps of transformers and for their layers. call: comfy_tome.dit_call, auto:
    comfy_tome.dit_auto of the package under test. merged: the attentions; a way is how many were merged."""

    def __init__(self, monkeypatch: Any, folder: Path, store: Any, call: Any, auto: Any, step: Any):
        super().__init__(monkeypatch, folder, store)
        serve = call.TransformerCall.serve

        def counted(*given: Any) -> Any:
            self.merged.append(1)
            return serve(*given)

        def compared(whole: Any, merged: Any, device: Any) -> Any:
            return call.Decision(2e4, 2e4 - 1e3 * self.saves_ms, 1e3 * self.costs_ms)

        monkeypatch.setattr(call.TransformerCall, "serve", counted)
        monkeypatch.setattr(call, "compared", compared)
        monkeypatch.setattr(auto, "measures", lambda config, *_: config.levels == "auto")
        self.time_steps(monkeypatch, step)
