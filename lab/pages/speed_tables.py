"""The tables of docs/speed.md and docs/vit.md, each from its CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..speed.growth import exponent
from ..store import RESULTS, Row, grouped, read
from ..store import markdown as table

FOLDER = RESULTS / "speed"
MODELS = {"sd15": "SD 1.5", "sdxl": "SDXL", "flux": "Flux", "qwen": "Qwen-Image", "wan": "Wan 14B"}
DEFAULT = "sample 0.75, own token"
"""The node's own default, which stands first."""
Found = dict[str, Row]
"""A line's rows, by variant."""


def about(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        driver, torch = row["driver"] and f"driver {row['driver']}", f"torch {row['torch']}"
        parts = (row["machine"], driver, torch, row.get("versions", ""), row["date"], f"commit {row['commit']}")
        lines.append(", ".join(filter(None, parts)))
    return "; ".join(dict.fromkeys(lines))


def _noted(made: str, rows: Sequence[Row], before: str = "", end: str = ".") -> str:
    return f"{made}\n{before}{about(rows)}{end}\n"


def times(row: Row | None) -> str:
    """How many times as fast as unmerged, and how far two GPUs' outcome is; a dash where it was not measured."""
    if not row or not row["speedup"]:
        return "-"
    differs = row.get("differs")
    return f"{float(row['speedup']):.2f}x" + (f" ({float(differs):.0e})" if differs else "")


# -- a column for each variant ---------------------------------------------------------------------------------------


def _of(column: str) -> Callable[[Found], str]:
    return lambda found: found["unmerged"][column]


def _model(found: Found) -> str:
    row = found["unmerged"]
    return f"{MODELS.get(row['model'], row['model'])} {row.get('size') or row['pixels'] + '²'}"


def _share(found: Found) -> str:
    """Of the attention in the unmerged step, told by the run that had the limit."""
    shares = [row["attention_share"] for row in found.values() if row["attention_share"]]
    return f"{float(shares[-1]):.0%}" if shares else "-"


def _milliseconds(found: Found) -> str:
    """The median unmerged step, p20 to p80."""
    row = found["unmerged"]
    digits = 1 if float(row["step_ms"]) < 100 else 0
    median, low, high = (f"{float(row[name]):.{digits}f}" for name in ("step_ms", "step_p20", "step_p80"))
    return f"{median} ms ({low} to {high})"


def _sent(found: Found) -> str:
    row = found["unmerged"]
    return f"{float(row['sent_mb']):,.0f} MB in {row['sent']}" if int(row["sent"]) else "-"


DIT = {
    "attention": _of("backend"),
    "model, size": _model,
    "tokens": lambda found: f"{int(found['unmerged']['tokens']):,}",
    "blocks run": lambda found: "{blocks} of {depth}".format(**found["unmerged"]),
    "attention's share": _share,
}


def by_variant(
    rows: list[Row], keys: str, cells: dict[str, Callable[[Found], str]], first: str = "", end: str = "."
) -> str:
    """Steps: a line for each group of rows that agree in `keys`, a column for each variant (for unmerged where there
    are two GPUs), that named `first` before the others. cells: what a line begins with."""
    cells = {**cells, "unmerged step (p20 to p80)": _milliseconds}
    backends = list(dict.fromkeys(row.get("backend") for row in rows))
    if "pixels" in rows[0]:
        rows.sort(key=lambda r: (r["variant"] != first, backends.index(r.get("backend")), r["model"], int(r["pixels"])))
    variants = dict.fromkeys(row["variant"] for row in rows if row["variant"] != "unmerged" or "gpus" in row)
    body = [
        [*(cell(found) for cell in cells.values()), *(times(found.get(name)) for name in variants)]
        for found in grouped(rows, keys.split(), "variant").values()
    ]
    remarks = sorted({f"\n{row['variant']}: {row['remark']}.\n" for row in rows if row.get("remark")})
    made = table([*cells, *variants], body)
    return _noted(made, rows, end=end) + "".join(remarks)


# -- other tables of docs/speed.md -----------------------------------------------------------------------------------


def bound(rows: list[Row]) -> str:
    """How much of what its zero-cost bound saves each method at ratio 0.5 saves."""

    def saved(row: Row) -> float:
        """Of the unmerged step; by speedups, each turn against turn with it, for rows may be of two runs."""
        return 1 - 1 / float(row["speedup"])

    names = ("merge 0.5", "merge 0.5, shared", "tomesd 0.5")
    body = []
    for (backend, *_), found in grouped(rows, ("backend", "model", "pixels"), "variant").items():
        if {"unmerged", "half at no cost", "merge 0.5"} <= found.keys():
            free, known = saved(found["half at no cost"]), [found.get(name) for name in names]
            shares = (f"{saved(row) / free:.0%}" if row and row["speedup"] and free > 0 else "-" for row in known)
            body.append([backend, _model(found), f"{free * float(found['unmerged']['step_ms']):.1f} ms", *shares])
    return table(["attention", "model, pixels", "the bound saves", *names], body) if body else ""


def memory(rows: list[Row]) -> str:
    """The peak that merging adds, in units of the token tensor."""
    rows = [{**row, "shape": f"{int(row['tokens']):,} x {row['channels']}"} for row in rows]
    shapes = {row["shape"]: row for row in rows}

    def cell(row: Row | None) -> str:
        if row is None or not row["merged_mb"]:
            return "-"
        return f"{float(row['added_tensors']):+.1f} ({float(row['alone_tensors']):.1f})"

    body = [["the token tensor itself", *(f"{float(row['token_tensor_mb']):.0f} MB" for row in shapes.values())]]
    for (method, ratio), found in grouped(rows, ("method", "ratio"), "shape").items():
        body.append([f"{method} {ratio}", *(cell(found.get(shape)) for shape in shapes)])
    return _noted(table(["method", *shapes], body), rows)


def growth(rows: list[Row]) -> str:
    """Microseconds by the number of tokens, and the exponent over the last three octaves."""
    sizes = sorted({int(row["tokens"]) for row in rows})
    body = []
    for (what, who), measured in grouped(rows, ("what", "who"), "tokens").items():
        found = {int(tokens): float(row["us"]) for tokens, row in measured.items()}
        cells = [f"{found[n]:,.{1 if found[n] < 100 else 0}f}" if n in found else "-" for n in sizes]
        slope = f"{exponent(list(found), list(found.values())):.2f}" if len(found) > 1 else "-"
        body.append([what, "torch" if who == "attention" else who, *cells, slope])
    order = ("draw", "gather", "match", "merge", "unmerge", "attention")
    body.sort(key=lambda line: order.index(line[0]))
    return _noted(table(["what", "by", *(f"{size:,}" for size in sizes), "exponent"], body), rows)


def generations(rows: list[Row]) -> str:
    """Whole generations in ComfyUI: a line a model, size and attention, a column a choice."""

    def cell(row: Row | None) -> str:
        """Seconds of the unmerged one, of others how many times as fast: p20 to p80."""
        if row is None or not row["speedup"]:
            return "-"
        stem, unit = ("", " s") if row["choice"] == "unmerged" else ("speedup_", "x")
        return " to ".join(dict.fromkeys(f"{float(row[stem + end]):.2f}" for end in ("p20", "p80"))) + unit

    choices = list(dict.fromkeys(row["choice"] for row in rows if row["speedup"]))
    body = [
        [f"{MODELS[model]} {size}, {kernel}", *(cell(found.get(choice)) for choice in choices)]
        for (model, size, kernel), found in grouped(rows, ("model", "size", "backend"), "choice").items()
    ]
    remarks = dict.fromkeys(f"{row['choice']}: {row['remark']}" for row in rows if row["remark"])
    return _noted(table(["", *choices], body, left=1), rows, f"{'; '.join(remarks)}. ")


def multires(rows: list[Row]) -> str:
    """Attention to keys at three resolutions: microseconds, and how many times as fast as cuDNN's to all tokens."""
    ways = [way for way in dict.fromkeys(row["way"] for row in rows) if way != "cudnn"]
    body = []
    for (shape,), found in grouped(rows, ("shape",), "way").items():
        base = found["cudnn"]
        tokens = f"{int(base['tokens']):,} x {base['heads']} of {base['channels']}, {base['text']} of text"
        cells = [f"{float(found[way]['us']):,.0f} ({times(found[way])})" if way in found else "-" for way in ways]
        body.append([shape, tokens, f"{float(base['us']):,.0f}", *cells])
    return _noted(table(["shape", "tokens x heads of channels", "cudnn, all tokens", *ways], body), rows)


# -- docs/vit.md -----------------------------------------------------------------------------------------------------


def _lost(row: Row | None) -> str:
    return f"{0.0 - float(row['lost']):+.2f} ± {float(row['lost_se']):.2f}" if row and row["lost"] else ""


def _faster(row: Row | None) -> str:
    return f"{float(row['speedup']):.2f}x" if row else ""


def _by_r(rows: list[Row], column: str) -> list[tuple[str, Found]]:
    """Each r, rising, with its rows by the values of a column."""
    return sorted(((r, found) for (r,), found in grouped(rows, ("r",), column).items()), key=lambda one: int(one[0]))


def _by_timm(row: Row) -> list[Row]:
    return [row | {"versions": f"timm {row['timm']}"}]


def vit_accuracy(rows: list[Row]) -> str:
    """The two models at a constant r."""
    body = []
    ours = [row for row in rows if (row["method"], row["schedule"]) == ("bipartite", "constant")]
    for r, found in _by_r(ours, "trained"):
        one = found["unmerged"]
        both = (found.get(name) for name in ("unmerged", "merged"))
        cells = [f"{float(row['accuracy']):.2f} ({_lost(row)})" if row else "" for row in both]
        rate, low, high = (f"{float(one[name]):,.0f}" for name in ("images_s", "images_s_p20", "images_s_p80"))
        body.append([r, one["tokens_left"], f"{rate} ({low} to {high})", _faster(one), *cells])
    first = rows[0]
    second = next((row for row in rows if row["trained"] == "merged"), first)
    head = ["r", "tokens left", "images/s (p20 to p80)", "speed", "trained without merging, %", "trained with it, %"]
    words = (
        f"{first['pictures']} held-out pictures, trained for {first['train_steps']} steps without merging and for "
        f"{second['train_steps']} with r = {second['train_r']}; in brackets the points against the first model "
        f"unmerged and the standard error of that paired difference. {first['precision']}, batch {first['batch']}, "
        f"median of {first['rounds']} runs in turns. "
    )
    return _noted(table(head, body), _by_timm(first), words)


def vit_schedules(rows: list[Row]) -> str:
    """Points lost and speed by schedule, trained without merging."""
    ours = [row for row in rows if row["trained"] == "unmerged" and row["method"] == "bipartite"]
    names = list(dict.fromkeys(row["schedule"] for row in ours))
    body = []
    for r, by_name in _by_r([row for row in ours if row["r"] != "0"], "schedule"):
        found = [by_name.get(name) for name in names]
        body.append([r, *(f"{_lost(row)}, {_faster(row)}, {row['tokens_left']} left" if row else "" for row in found)])
    return table(["r", *names], body)


def vit_methods(rows: list[Row]) -> str:
    """Other ways to have as many tokens fewer, trained without merging."""
    ours = [row for row in rows if row["trained"] == "unmerged" and row["schedule"] == "constant"]
    methods = grouped(ours, ("method",), "r")
    rs = sorted(list(methods.values())[-1], key=int)
    body = [
        [name, *(", ".join(filter(None, (_lost(found.get(r)), _faster(found.get(r))))) for r in rs)]
        for (name,), found in methods.items()
    ]
    return table(["method", *(f"r = {r}" for r in rs)], body)


def vit_large(rows: list[Row]) -> str:
    """Large models with random weights: images a second."""
    kinds = ("bipartite, constant", "bipartite, falling", "bipartite, unweighted, constant", "limit, constant")
    body = []
    for model, *how in dict.fromkeys((row["model"], row["dtype"], row["backend"]) for row in rows):
        mine = [row for row in rows if [row["model"], row["dtype"], row["backend"]] == [model, *how]]
        rate = next(f"{float(row['images_s']):,.0f}" for row in mine if row["method"] == "unmerged")
        named = [{**row, "kind": f"{row['method']}, {row['schedule']}"} for row in mine if row["method"] != "unmerged"]
        for r, found in _by_r(named, "kind"):
            if one := found.get(kinds[0]):
                fewer = f"{one['tokens']} to {one['tokens_left']}"
                body.append([model, ", ".join(how), rate, r, fewer, *(_faster(found.get(kind)) for kind in kinds)])
    head = ["model, pixels", "precision, attention", "unmerged, images/s", "r", "tokens"]
    batches = ", ".join(dict.fromkeys(f"{row['model']}: {row['batch']}" for row in rows))
    words = f"Median of {rows[0]['rounds']} runs in turns, batches {batches}. "
    return _noted(table([*head, "constant", "falling", "unweighted", "limit"], body), _by_timm(rows[0]), words)


def _table(csv: str, keys: str, cells: dict[str, Callable[[Found], str]], where: Any = bool, **more: str) -> Any:
    """A row of MAKERS with a column for each variant."""
    return csv, where, partial(by_variant, keys=keys, cells=cells, **more)


_PLACE = {"model, pixels": _model}
_HOSTS = {"attention": _of("backend"), **_PLACE}
_STEPS = ("steps", "backend model pixels", {**_HOSTS, "levels": lambda found: _of("levels")(found).replace(" ", ", ")})
# table: (its CSV, which of the rows, what makes it)
MAKERS: dict[str, tuple[str, Callable[[Row], bool], Callable[[list[Row]], str]]] = {
    "speed": _table(
        "hosts", "model pixels", _PLACE, lambda row: row["backend"] == "default", first=DEFAULT,
        end="; median of the turns.",
    ),
    "hosts": _table("hosts", "backend model pixels", _HOSTS, lambda row: row["backend"] != "default"),
    "steps_graph": _table(*_STEPS, lambda row: row["mode"] == "graph"),
    "steps_eager": _table(*_STEPS, lambda row: row["mode"] == "eager"),
    "dit": _table("dit", "backend model size", DIT),
    "dit_multires": _table("dit-multires", "backend model size", DIT),
    "multigpu": _table(
        "multigpu", "model pixels images gpus", {**_PLACE, "images": _of("images"), "GPUs": _of("gpus")}
    ),
    "parallel": _table("parallel", "model pixels gpus", {**_PLACE, "GPUs": _of("gpus"), "each sends": _sent}),
    "bound": ("steps", lambda row: row["mode"] == "graph", bound),
    "memory": ("memory", bool, memory),
    "growth": ("growth", lambda row: row["us"] != "", growth),
    "generations": ("generations", bool, generations),
    "multires": ("multires", bool, multires),
    "vit_accuracy": ("../fidelity/vit", bool, vit_accuracy),
    "vit_schedules": ("../fidelity/vit", bool, vit_schedules),
    "vit_methods": ("../fidelity/vit", bool, vit_methods),
    "vit_large": ("vit", bool, vit_large),
}  # fmt: skip


def made(name: str, folder: Path = FOLDER) -> str:
    """The table of that name; empty where nothing was measured."""
    source, chosen, maker = MAKERS[name]
    rows = [row for row in read(folder / f"{source}.csv") if chosen(row)]
    return maker(rows) if rows else ""
