"""What AUTOMATIC1111, Forge and reForge load: the panel and its callbacks, from a1111_extension.

The repository is imported as one package, as ComfyUI does it, so that all code uses relative imports and no
top-level name can clash with another extension's. The host keeps this folder's parent on sys.path only while this
file runs, so everything is imported here and now.
"""

import importlib
import sys
import types
from pathlib import Path

_PACKAGE = "sd_webui_tome"

if _PACKAGE not in sys.modules:
    # Made by hand: the root's own __init__.py is ComfyUI's entry and is not to run here.
    _package = types.ModuleType(_PACKAGE)
    _package.__path__ = [str(Path(__file__).absolute().parent.parent)]
    sys.modules[_PACKAGE] = _package

_script = importlib.import_module(f"{_PACKAGE}.a1111_extension.script")

# The host registers every Script class it finds among this module's names.
ToMeScript = _script.ToMeScript
# "Reload UI" forgets all callbacks and runs this file again, while the modules above stay loaded.
_script.register()
