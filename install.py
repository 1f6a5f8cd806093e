#!/usr/bin/env python3
"""Sets ToMe up, shows it and tests it. Without arguments: a check that is silent when all is well.

ComfyUI-Manager and AUTOMATIC1111 run this file without arguments, in their own Python, at each start.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (the one file that an older Python may be asked to run)
    sys.exit(f"ToMe needs Python 3.10 or newer; this is Python {sys.version_info[0]}.{sys.version_info[1]}.")

import argparse
from pathlib import Path

from installer.console import exit_status

ROOT = Path(__file__).resolve().parent


COMPARE = """\
Generates pictures of the same seeds in a real ComfyUI: unmerged, with each of ToMe's presets, with fewer steps, with
EasyCache and with both. Writes times of whole generations, memory and likeness to the unmerged pictures. By default 39
generations of 20 steps a size. Ctrl-C stops it; the same command goes on. A workflow runs whatever nodes it names: use
one that you trust."""


def given(path: str) -> str:
    """An empty path is one that a script forgot to set, not the default."""
    if not path:
        raise argparse.ArgumentTypeError("the path is empty")
    return path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="install.py", description=__doc__.split("\n\n")[0])
    commands = top.add_subparsers(dest="command", metavar="command")

    def add_path(to: argparse.ArgumentParser, name: str, metavar: str, text: str, default: str | None = None) -> None:
        to.add_argument(name, metavar=metavar, type=given, help=text, default=default)

    demo = commands.add_parser("demo", help="make pictures in a real ComfyUI without and with ToMe")
    about = "compare unmerged, ToMe's presets, fewer steps and EasyCache on your own model"
    compare = commands.add_parser("compare", help=about, description=COMPARE)
    for command, out in ((demo, "out"), (compare, "out/compare")):
        add_path(command, "--comfyui", "DIR", "a ComfyUI of your own (default: COMFYUI_DIR, else one is fetched)")
        add_path(command, "--checkpoint", "FILE", "a Stable Diffusion checkpoint (default: the small demo model)")
        add_path(command, "--out", "DIR", f"where the results go (default: {out})", out)
    api = "a workflow of your own in API form; it runs whatever nodes it names, with the custom nodes of --comfyui"
    add_path(compare, "--workflow", "FILE.json", api)
    sizes = "sides or WIDTHxHEIGHT in pixels (default: what the model was trained for, or the workflow's own)"
    compare.add_argument("--sizes", metavar="SIZE", nargs="+", help=sizes)
    add_path(compare, "--prompts", "FILE", "a text file with a prompt a line, which stays with you")

    about = "run ruff and every test; further arguments go to pytest"
    tests = commands.add_parser("test", help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False)
    tests.add_argument("--fast", action="store_true", help="some tests of every room, in 90 s (tests/fast.txt)")
    add_path(tests, "--comfyui", "DIR", "the tests of ComfyUI's nodes, on a ComfyUI of your own")

    for name, title in (("comfyui", "ComfyUI"), ("a1111", "AUTOMATIC1111, Forge or reForge")):
        host = commands.add_parser(name, help=f"link this repository into {title}")
        add_path(host, "folder", "DIR", f"the folder that {title} lies in")
        how = host.add_mutually_exclusive_group()
        how.add_argument("--copy", action="store_true", help="copy instead of linking")
        how.add_argument("--remove", action="store_true", help="take the link or the copy out again")
    return top


def main(arguments: list[str]) -> int:
    """Run a command and return the exit status."""
    options, rest = parser().parse_known_args(arguments)
    if rest and options.command != "test":
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command is None:
        from installer.check import problem

        found = problem()
        if found:
            print(found)
        return 1 if found else 0
    if options.command in ("demo", "compare", "test"):
        from installer import run  # not for links: a host's embedded Python has no venv

        if options.command == "demo":
            return run.demo(options.comfyui, options.checkpoint, options.out)
        if options.command == "compare":
            return run.compare(options)
        return run.test(rest, fast=options.fast, host=options.comfyui)
    from installer import link

    host = link.COMFYUI if options.command == "comfyui" else link.A1111
    folder = Path(options.folder)
    print(link.remove(folder, host) if options.remove else link.add(folder, host, copy=options.copy))
    return 0


if __name__ == "__main__":
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a path that the console's code page does not know
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
