"""Stand-ins for packages that ComfyUI imports without a guard. Each case runs in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from installer.paths import ROOT


def python(code: str, path: Path | None = None) -> str:
    head = f"import sys\nsys.path[:0] = [{str(ROOT)!r}] + {[str(path)] if path else []!r}\n"
    code = head + "from installer import shims\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def package(folder: Path, name: str, files: dict[str, str]) -> Path:
    for file, text in files.items():
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_text(text)
    return folder


def test_names_of_a_missing_package_can_be_taken_but_not_called():
    code = """
        shims.install(["not_there_at_all"])
        import not_there_at_all.transforms.functional as F
        from not_there_at_all.transforms import InterpolationMode
        from not_there_at_all import transforms
        modes = {InterpolationMode.NEAREST: 0}
        try:
            F.resize(1)
        except RuntimeError as error:
            print(error)
    """
    assert "not_there_at_all.transforms.functional.resize was called" in python(code)


def test_a_working_package_is_left_alone(tmp_path):
    files = {"__init__.py": "count = 1\nfrom . import ops", "ops.py": "def nms(): return 7"}
    code = """
        shims.install(["real_one"])
        import real_one.ops
        print(real_one.ops.nms(), real_one.count, hasattr(real_one, "missing"))
    """
    assert python(code, package(tmp_path, "real_one", files)) == "7 1 False"


def test_a_broken_package_gets_a_stand_in(tmp_path):
    files = {"__init__.py": "from . import ops\nraise RuntimeError('operator does not exist')", "ops.py": "x = 1"}
    code = """
        shims.install(["broken_one"])
        from broken_one.ops import roi_align
        import broken_one
        print(type(roi_align).__name__, type(broken_one).__name__)
    """
    assert python(code, package(tmp_path, "broken_one", files)) == "Absent AbsentModule"


def test_installing_does_not_import_torch_and_twice_is_harmless():
    code = """
        shims.install()
        shims.install()
        print("torch" in sys.modules, sum(isinstance(finder, shims.Finder) for finder in sys.meta_path))
    """
    assert python(code) == "False 1"


def test_transformers_is_told_the_truth():
    code = """
        from importlib.util import find_spec
        real = find_spec("torchvision") is not None
        shims.install()
        import torchvision
        from transformers.utils import is_torchvision_available
        print(real == is_torchvision_available())
    """
    assert python(code) == "True"
