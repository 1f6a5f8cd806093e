"""The rooms of the house: who may import whom. docs/design.md draws them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A floor imports what is below it, and its own room.
FLOORS = (
    ("methods",),
    ("decided",),
    ("options",),
    ("config",),
    ("changes",),
    ("core",),
    ("kernels",),
    ("merging",),
    ("attention",),
    ("hooks",),
    ("autotune",),
    ("inspect",),
    ("scripts", "vit"),
)
PACKAGES = ("shared_tome", "comfy_tome", "a1111_extension", "lab", "installer", "demo")


def modules() -> dict[str, Path]:
    """Each module of the project by its name from the root."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def runs(tree: ast.AST) -> Iterator[ast.AST]:
    """What of a module runs: all but what stands under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
            yield node
            yield from runs(node)


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, wherever the statement stands.

    `from package import name` counts as an import of package.name where that is a module: what the package's own
    __init__ imports is already there then.
    """
    found, path = set(), MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in runs(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found |= {inner} if inner in MODULES else {base} & MODULES.keys()
    return found - {name}


@cache
def graph() -> dict[str, set[str]]:
    """What each module imports; it takes seconds, and not every process that collects this file runs it."""
    return {name: imports(name) for name in MODULES}


def floor_of(module: str) -> int | None:
    """The floor of a module of the core; None: the core's own face, which only names what is to be had from outside."""
    parts = module.split(".")
    return None if len(parts) == 1 else next(n for n, rooms in enumerate(FLOORS) if parts[1] in rooms)


def test_the_walk_sees_what_is_imported():
    found = graph()
    assert {"shared_tome.core.grid", "shared_tome.kernels", "shared_tome.config"} <= found["shared_tome.merging.match"]
    assert "shared_tome.scripts" in found["shared_tome"], "an import inside a function"
    assert "shared_tome.merging.call" in found["shared_tome.autotune.layer"]


def test_no_floor_looks_up():
    up = []
    for module, found in graph().items():
        if module.partition(".")[0] != "shared_tome" or (floor := floor_of(module)) is None:
            continue
        for other in found:
            room, theirs = module.split(".")[1], floor_of(other)
            if theirs is None or theirs > floor or (theirs == floor and other.split(".")[1] != room):
                up.append(f"{module} imports {other}")
    assert not up, "\n".join(up)


def test_no_host_in_the_core():
    assert not [
        f"{module} imports {other}"
        for module, found in graph().items()
        for other in found
        if module.partition(".")[0] == "shared_tome" != other.partition(".")[0]
    ]


def test_no_circle():
    """Of modules that import each other, directly or by way of others."""
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for other in sorted(graph()[module]):
            walk(other, (*way, module))
        done.add(module)

    for module in graph():
        walk(module, ())
