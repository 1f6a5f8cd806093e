"""Makes the tables and plots of all pages anew: `python -m lab.pages`.

`--check` writes nothing and fails where a page and what it tells of disagree; `--plots` draws docs/images too (that
needs matplotlib).
"""

from __future__ import annotations

import argparse
import sys

from . import fidelity_plots, speed_plots
from .fill import PAGES, ROOT, filled


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.pages", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is not up to date")
    parser.add_argument("--plots", action="store_true", help="draw the plots too")
    args = parser.parse_args()
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        fresh = filled(text)
        if fresh != text:
            stale.append(page)
            if not args.check:
                path.write_text(fresh, encoding="utf-8")
    if args.plots:
        for draw in (fidelity_plots.draw, speed_plots.draw):
            print(*draw(ROOT / "docs" / "images"), sep="\n")
    if args.check and stale:
        print(f"not up to date: {', '.join(stale)}; run `python -m lab.pages`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
