"""The check that `install.py` does without arguments, in the host's own Python. It has to be quick."""

from __future__ import annotations

import re
from importlib import metadata

from .paths import ROOT

MIN_TORCH = (2, 1)
TRY_IT = 'To try ToMe without a host of your own: "python install.py demo".'


def problem() -> str:
    """One line on what keeps ToMe from working here; empty when all is well."""
    missing = [name for name in ("shared_tome", "comfy_tome") if not (ROOT / name).is_dir()]
    if missing:
        return f"ToMe: {', '.join(missing)} is missing in {ROOT}: download or clone the repository again."
    wanted = ".".join(map(str, MIN_TORCH))
    try:
        found = metadata.version("torch")  # read from its metadata: importing torch takes seconds
    except metadata.PackageNotFoundError:
        return f"ToMe: this Python has no PyTorch; ToMe needs {wanted} or newer. {TRY_IT}"
    except (OSError, KeyError, ValueError):
        return ""  # there is a PyTorch, and its metadata are damaged: the host runs with it all the same
    numbers = re.match(r"(\d+)\.(\d+)", found or "")
    if numbers and tuple(map(int, numbers.groups())) < MIN_TORCH:
        return f"ToMe: PyTorch {found} is too old; ToMe needs {wanted} or newer."
    return ""
