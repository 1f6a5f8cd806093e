"""Triton may be missing, broken or unwanted: the core does its work all the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import forks

from shared_tome import kernels

ROOT = Path(__file__).resolve().parents[2]
WORK = (
    "import shared_tome\n"
    "for method in ('merge', 'sample'):\n"
    "    config = shared_tome.ToMeConfig(method=method, min_tokens=0)\n"
    "    plan = shared_tome.match_tokens(torch.randn(1, 64, 16), (8, 8), config)\n"
    "    assert plan.kept == 16 and plan.merge(torch.randn(1, 64, 16)).shape == (1, 16, 16)\n"
)


def python(code: str, **environment: str) -> str:
    """What it says where torch alone is imported."""
    done = forks.with_torch("-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("tokens", "kept", "captured", "pays"),
    [(4096, 1024, False, False), (4096, 1024, True, True), (65536, 16384, False, True)],
)
def test_a_small_copy_is_left_to_index_select_unless_captured(monkeypatch, tokens, kept, captured, pays):
    """By size alone, so that no GPU is needed to see it."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    x = SimpleNamespace(is_cuda=True, shape=(2, tokens, 320), element_size=lambda: 2)
    assert kernels.tokens.pays_to_gather(x, SimpleNamespace(shape=(1, kept))) == pays


def test_on_the_cpu_triton_is_never_imported():
    python(f"import sys, torch\n{WORK}assert 'triton' not in sys.modules and 'torch._dynamo' not in sys.modules")


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "OSError"])
def test_a_triton_that_cannot_be_imported(error):
    """Asked for by the interpreter's variable, which stands for a GPU here."""
    said = python(
        "import sys, logging, torch\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == 'triton': raise {error}('not here')\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'triton']: del sys.modules[name]\n"
        f"sys.meta_path.insert(0, Block())\n{WORK}{WORK}",
        TRITON_INTERPRET="1",
    )
    assert said.count("INFO:ToMe:no Triton kernels") == 1


@pytest.mark.parametrize("word", ["reference", "0"])
def test_switched_off(word):
    python(
        f"import sys, torch\n{WORK}assert 'triton' not in sys.modules and not shared_tome.kernels.ready()",
        TRITON_INTERPRET="1",
        TOME_KERNELS=word,
    )


def test_a_word_that_the_switch_does_not_know_is_said_once():
    pytest.importorskip("triton")
    said = python(f"import torch\n{WORK}assert shared_tome.kernels.ready()", TRITON_INTERPRET="1", TOME_KERNELS="off")
    assert said.count("TOME_KERNELS must be one of auto, reference, got 'off'; kernels stay on") == 1


def test_switched_off_for_a_call():
    pytest.importorskip("triton")
    python(
        "import torch\nfrom shared_tome import kernels\n"
        "with kernels.use('reference'):\n"
        "    assert not kernels.ready()\n"
        "    with kernels.use('auto'): assert kernels.ready()\n"
        "    assert not kernels.serves(torch.zeros(1))\n"
        "assert kernels.serves(torch.zeros(1))",
        TRITON_INTERPRET="1",
    )
    with pytest.raises(ValueError, match="impl must be one of auto, reference, got 'off'"), kernels.use("off"):
        pass


def test_two_copies_in_one_process(tmp_path):
    """Hosts load the core under names of their own; operators must not collide."""
    pytest.importorskip("triton")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "__init__.py").write_text("")
    (tmp_path / "x" / "shared_tome").symlink_to(ROOT / "shared_tome", target_is_directory=True)
    out = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from shared_tome import kernels as a\n"
        "from x.shared_tome import kernels as b\n"
        "print(a.ready(), b.ready(), a.names.NAMESPACE, b.names.NAMESPACE)"
    )
    assert out.split() == ["True", "True", "shared_tome_kernels", "x_shared_tome_kernels"]
