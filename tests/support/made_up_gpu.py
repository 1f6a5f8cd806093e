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
