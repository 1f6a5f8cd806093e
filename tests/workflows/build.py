"""Write example_workflows/: `python tests/workflows/build.py`, after a default or an option of ToMe changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "example_workflows"

sys.path[:0] = [str(REPO), str(REPO / "tests")]
from workflows.examples import EXAMPLES
from workflows.graph import Graph
from workflows.picture import draw


def graphs() -> list[Graph]:
    """Every workflow."""
    return [example() for example in EXAMPLES]


def text(graph: Graph) -> str:
    """What its file says."""
    return json.dumps(graph.json(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for graph in graphs():
        (FOLDER / f"{graph.name}.json").write_text(text(graph), encoding="utf-8")
        draw(graph).save(FOLDER / f"{graph.name}.jpg", quality=88, optimize=True)
        print(graph.name)


if __name__ == "__main__":
    main()
