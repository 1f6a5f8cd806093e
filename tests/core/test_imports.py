"""The core imports torch alone and is happy under any name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parents[2] / "shared_tome"
FILES = sorted(CORE.rglob("*.py"))
# Kernels may name triton and the map's legend Pillow, which they import only when called.
LAZY = {"triton": "kernels", "PIL": "legend.py"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CORE.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fresh_interpreter_needs_torch_alone():
    """What importing the core adds to `import torch` is the core itself and Python's own modules."""
    added = python(
        "import sys, torch; before = set(sys.modules); import shared_tome\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    ).split()
    assert "shared_tome" in added
    assert set(added) - {"shared_tome"} - set(sys.stdlib_module_names) == set()


def test_hosts_and_plugins_may_be_missing():
    """Blocked, not merely absent: an import inside a try would be noticed."""
    blocked = ("triton", "safetensors", "comfy", "comfy_api", "modules", "diffusers", "transformers", "PIL", "xformers")
    python(
        "import sys, torch\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {blocked!r}: sys.exit('the core imported ' + name)\n"
        f"for name in [name for name in sys.modules if name.partition('.')[0] in {blocked!r}]: del sys.modules[name]\n"
        "sys.meta_path.insert(0, Block())\n"
        "import shared_tome\n"
        "plan = shared_tome.match_tokens(torch.randn(1, 16, 4), (4, 4), shared_tome.ToMeConfig(method='merge'))\n"
        "assert plan.kept == 4"
    )


def imported(tree):
    """(level, module) of each import statement, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, name.name) for name in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_of_its_own_are_relative(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    depth = len(path.relative_to(CORE).parts)
    statements = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    at_top = list(imported(ast.Module(statements, [])))
    for level, module in imported(tree):
        if level:
            assert level <= depth, f"{path.name} reaches outside the core"
            continue
        root = module.partition(".")[0]
        lazy = LAZY.get(root) in path.parts and (0, module) not in at_top
        assert root == "torch" or root in sys.stdlib_module_names or lazy, f"{path.name} imports {module}"


def test_under_another_name(tmp_path):
    """As ComfyUI loads it: inside a package of any name, twice in one process if need be."""
    package = tmp_path / "x"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "shared_tome").symlink_to(CORE, target_is_directory=True)
    out = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch\n"
        "from x.shared_tome import ToMeConfig, match_tokens\n"
        "assert 'shared_tome' not in sys.modules\n"
        "plan = match_tokens(torch.randn(1, 16, 4), (4, 4), ToMeConfig())\n"
        "import shared_tome\n"
        "print(type(plan).__module__, shared_tome.ToMeConfig is ToMeConfig)"
    )
    assert out.split() == ["x.shared_tome.merging.plan", "False"]


def test_public_names():
    import shared_tome

    assert {"ToMeConfig", "match_tokens", "ModelCall", "Plan", "attend", "METHODS"} <= set(shared_tome.__all__)
    assert all(hasattr(shared_tome, name) for name in shared_tome.__all__)
