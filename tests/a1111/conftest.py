"""Fixtures: the small host with the extension loaded into it as the real one loads it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from . import host as program
from . import models

PACKAGE = "sd_webui_tome"


@pytest.fixture(scope="package")
def loaded():
    """The first load: the extension binds to this host's modules, as it does to the real one's."""
    host = program.Host()
    before = {name: sys.modules.get(name) for name in host.modules}
    sys.modules.update(host.modules)
    host.start()
    yield host
    for name, module in before.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture(scope="package")
def tome(loaded):
    """The extension's modules by name."""
    names = (
        "block", "forge", "gallery", "hooks", "infotext", "notes", "options", "panel", "report", "sampling", "script",
        "seeds", "settings", "xyz",
    )  # fmt: skip
    found = {name: sys.modules[f"{PACKAGE}.a1111_extension.{name}"] for name in names}
    core = sys.modules[f"{PACKAGE}.shared_tome"]
    hooks = {name: getattr(core.hooks, name) for name in ("engine", "heads", "parts", "trials")}
    return SimpleNamespace(**found, **hooks, core=core, maps=sys.modules[f"{PACKAGE}.shared_tome.inspect.maps"])


@pytest.fixture
def host(loaded):
    """The host as new, with a small model."""
    loaded.errors.clear(), loaded.order.clear(), loaded.calls.clear()
    loaded.interrupt_at, loaded.forge, loaded.dtype = None, False, torch.float32
    loaded.opts.data = {"batch_cond_uncond": True}
    loaded.modules["modules.sd_unet"].current_unet = None
    loaded.shared.sd_model = models.small_model()
    loaded.start()
    yield loaded
    assert not loaded.errors, f"a callback raised: {loaded.errors}"
