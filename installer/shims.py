"""Stand-ins for torchvision and torchaudio, which ComfyUI imports without a guard.

Neither is needed to run a U-Net, and a build that does not match torch's fails on import. With `install`
a working one is imported as ever; where one is missing or fails, every import below its name gives an
empty module: names can be taken from it, but calling one raises an error that says what is missing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

PACKAGES = ("torchvision", "torchaudio")


class Absent:
    """A name of a package that is not there. It can be imported, passed on and read from, but not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._name}.{name}")

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        return ()  # timm derives classes from torchvision's; those are never used here

    def __call__(self, *args: object, **kwargs: object) -> None:
        package = self._name.partition(".")[0]
        raise RuntimeError(f"{self._name} was called, but there is no {package} that fits this torch")


class AbsentModule(ModuleType):
    """A module that has every public name."""

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


class Loader(importlib.abc.Loader):
    """Loads the real package, and empties it when that fails; without a real one the module is empty."""

    def __init__(self, finder: Finder, real: importlib.abc.Loader | None = None) -> None:
        self.finder, self.real = finder, real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return AbsentModule(spec.name) if self.real is None else self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        try:
            if self.real is not None:
                self.real.exec_module(module)
        except Exception:  # a build for another torch fails in many ways: RuntimeError, OSError, ImportError
            for loaded in [loaded for loaded in sys.modules if loaded.startswith(f"{name}.")]:
                del sys.modules[loaded]
            for public in [key for key in vars(module) if not key.startswith("__")]:
                delattr(module, public)
            module.__class__ = AbsentModule
            self.finder.absent.add(name)


class Finder(importlib.abc.MetaPathFinder):
    """Stands before the other finders. Decides at the import, not before: torch must not come first."""

    def __init__(self, packages: Sequence[str], absent: Sequence[str]) -> None:
        self.packages = frozenset(packages)
        self.absent = set(absent)

    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package in self.absent:
            return importlib.machinery.ModuleSpec(name, Loader(self), is_package=True)
        if name not in self.packages:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(self, spec.loader)
        return spec


def install(packages: Sequence[str] = PACKAGES) -> None:
    """Make imports of `packages` succeed, whatever is installed. Call it before comfy's first import."""
    if any(isinstance(finder, Finder) for finder in sys.meta_path):
        return
    absent = [name for name in packages if name not in sys.modules and importlib.util.find_spec(name) is None]
    _tell_transformers(absent)
    sys.meta_path.insert(0, Finder(packages, absent))


def _tell_transformers(absent: Sequence[str]) -> None:
    """Transformers goes by find_spec, which finds a stand-in too: let it ask, and keep the answer, before."""
    if not absent:
        return
    try:
        from transformers.utils import import_utils
    except ImportError:
        return
    for name in absent:
        ask = getattr(import_utils, f"is_{name}_available", None)
        if ask is not None:
            ask()
