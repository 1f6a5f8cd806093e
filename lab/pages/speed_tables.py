"""The tables of docs/speed.md, each from its CSV in lab/results/speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..speed.growth import exponent
from ..store import RESULTS, Row, grouped, read
from ..store import markdown as table

FOLDER = RESULTS / "speed"
MODELS = {"sd15": "SD 1.5", "sdxl": "SDXL", "flux": "Flux", "qwen": "Qwen-Image", "wan": "Wan 14B"}


def about(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        driver, torch = row["driver"] and f"driver {row['driver']}", f"torch {row['torch']}"
        parts = (row["machine"], driver, torch, row.get("versions", ""), row["date"], f"commit {row['commit']}")
        lines.append(", ".join(filter(None, parts)))
    return "; ".join(dict.fromkeys(lines))


def times(row: Row | None) -> str:
    """How many times as fast as unmerged, and how far two GPUs' outcome is; a dash where it was not measured."""
    if not row or not row["speedup"]:
        return "-"
    differs = row.get("differs")
    return f"{float(row['speedup']):.2f}x" + (f" ({float(differs):.0e})" if differs else "")


def _milliseconds(row: Row) -> str:
    """The median step, p20 to p80."""
    digits = 1 if float(row["step_ms"]) < 100 else 0
    low, high = (f"{float(row[name]):.{digits}f}" for name in ("step_p20", "step_p80"))
    return f"{float(row['step_ms']):.{digits}f} ms ({low} to {high})"


def _by_variant(
    rows: Sequence[Row], keys: Sequence[str], heads: Sequence[str], cell: Callable[[Row], list[str]]
) -> str:
    """A line for each group of rows that agree in `keys`, a column for each variant (for unmerged where there are two
    GPUs). cell: the line's first cells."""
    variants = dict.fromkeys(row["variant"] for row in rows if row["variant"] != "unmerged" or "gpus" in row)
    body = [
        [*cell(found["unmerged"]), _milliseconds(found["unmerged"]), *(times(found.get(name)) for name in variants)]
        for found in grouped(rows, keys, "variant").values()
    ]
    return table([*heads, "unmerged step (p20 to p80)", *variants], body)


# The node's own default stands first.
DEFAULT = "sample 0.75, own token"


def speed(rows: list[Row]) -> str:
    """Steps of a real ComfyUI with its own choice of attention."""
    rows.sort(key=lambda row: (row["variant"] != DEFAULT, row["model"], int(row["pixels"])))
    made = _by_variant(rows, ("model", "pixels"), ["model, pixels"], lambda row: [_model(row)])
    return f"{made}\n{about(rows)}; median of the turns.\n"


def _model(row: Row) -> str:
    return f"{MODELS.get(row['model'], row['model'])} {row['pixels']}²"


def hosts(rows: list[Row]) -> str:
    """The same for the attention kernels that were asked for."""
    keys, heads = ("backend", "model", "pixels"), ["attention", "model, pixels"]
    return f"{_by_variant(rows, keys, heads, lambda row: [row['backend'], _model(row)])}\n{about(rows)}.\n"


def steps(rows: list[Row]) -> str:
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    rows.sort(key=lambda row: (backends.index(row["backend"]), row["model"], int(row["pixels"])))
    keys, heads = ("backend", "model", "pixels"), ["attention", "model, pixels", "levels"]
    made = _by_variant(rows, keys, heads, lambda row: [row["backend"], _model(row), row["levels"].replace(" ", ", ")])
    remarks = sorted({f"{row['variant']}: {row['remark']}" for row in rows if row["remark"]})
    return "".join([made, f"\n{about(rows)}.\n", *(f"\n{remark}.\n" for remark in remarks)])


def _saved(row: Row) -> float:
    """The share of the unmerged step that is saved."""
    return 1 - 1 / float(row["speedup"])


def bound(rows: list[Row]) -> str:
    """How much of what its zero-cost bound saves each method at ratio 0.5 saves."""
    body = []
    for (backend, *_), found in grouped(rows, ("backend", "model", "pixels"), "variant").items():
        if not {"unmerged", "half at no cost", "merge 0.5"} <= set(found):
            continue
        # By speedups, each turn against turn with the unmerged step: rows may be of two runs.
        free = _saved(found["half at no cost"])
        body.append([backend, _model(found["unmerged"]), f"{free * float(found['unmerged']['step_ms']):.1f} ms"])
        for name in ("merge 0.5", "merge 0.5, shared", "tomesd 0.5"):
            row = found.get(name)
            body[-1].append(f"{_saved(row) / free:.0%}" if row is not None and row["speedup"] and free > 0 else "-")
    head = ["attention", "model, pixels", "the bound saves", "merge 0.5", "merge 0.5, shared", "tomesd 0.5"]
    return table(head, body) if body else ""


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
    return f"{table(['method', *shapes], body)}\n{about(rows)}.\n"


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
    head = ["what", "by", *(f"{size:,}" for size in sizes), "exponent"]
    return f"{table(head, body)}\n{about(rows)}.\n"


def dit(rows: list[Row]) -> str:
    """Transformers in ComfyUI, scaled to their depth."""

    keys = ("backend", "model", "size")
    shares = {tuple(row[key] for key in keys): row["attention_share"] for row in rows if row["attention_share"]}

    def cell(row: Row) -> list[str]:
        share = shares.get(tuple(row[key] for key in keys))  # of the run that had the limit
        share = f"{float(share):.0%}" if share else "-"
        name = f"{MODELS.get(row['model'], row['model'])} {row['size']}"
        return [row["backend"], name, f"{int(row['tokens']):,}", f"{row['blocks']} of {row['depth']}", share]

    heads = ["attention", "model, size", "tokens", "blocks run", "attention's share"]
    return f"{_by_variant(rows, keys, heads, cell)}\n{about(rows)}.\n"


def generations(rows: list[Row]) -> str:
    """Whole generations in ComfyUI: a line a model, size and attention, a column a choice."""
    choices = list(dict.fromkeys(row["choice"] for row in rows if row["speedup"]))
    body = [
        [f"{MODELS[model]} {size}, {kernel}", *(_generation(found.get(choice)) for choice in choices)]
        for (model, size, kernel), found in grouped(rows, ("model", "size", "backend"), "choice").items()
    ]
    remarks = dict.fromkeys(f"{row['choice']}: {row['remark']}" for row in rows if row["remark"])
    return f"{table(['', *choices], body, left=1)}\n{'; '.join(remarks)}. {about(rows)}.\n"


def _generation(row: Row | None) -> str:
    """Seconds of the unmerged one, p20 to p80; of others how many times as fast."""
    if row is None or not row["speedup"]:
        return "-"
    if row["choice"] == "unmerged":
        low, high = (f"{float(row[name]):.2f}" for name in ("p20", "p80"))
        return f"{low} s" if low == high else f"{low} to {high} s"
    low, high = (f"{float(row[f'speedup_{name}']):.2f}" for name in ("p20", "p80"))
    return f"{low}x" if low == high else f"{low} to {high}x"


def multigpu(rows: list[Row]) -> str:
    keys, heads = ("model", "pixels", "images", "gpus"), ["model, pixels", "images", "GPUs"]
    made = _by_variant(rows, keys, heads, lambda row: [_model(row), row["images"], row["gpus"]])
    return f"{made}\n{about(rows)}.\n"


def parallel(rows: list[Row]) -> str:
    """Steps of diffusers on one and on two GPUs, and what each of these sends in a step without ToMe."""

    def cells(row: Row) -> list[str]:
        sent = f"{float(row['sent_mb']):,.0f} MB in {row['sent']}" if int(row["sent"]) else "-"
        return [_model(row), row["gpus"], sent]

    made = _by_variant(rows, ("model", "pixels", "gpus"), ["model, pixels", "GPUs", "each sends"], cells)
    return f"{made}\n{about(rows)}.\n"


def multires(rows: list[Row]) -> str:
    """Attention to keys at three resolutions: microseconds, and how many times as fast as cuDNN's to all tokens."""
    ways = [way for way in dict.fromkeys(row["way"] for row in rows) if way != "cudnn"]
    body = []
    for (shape,), found in grouped(rows, ("shape",), "way").items():
        base = found["cudnn"]
        tokens = f"{int(base['tokens']):,} x {base['heads']} of {base['channels']}, {base['text']} of text"
        cells = [f"{float(found[way]['us']):,.0f} ({times(found[way])})" if way in found else "-" for way in ways]
        body.append([shape, tokens, f"{float(base['us']):,.0f}", *cells])
    head = ["shape", "tokens x heads of channels", "cudnn, all tokens", *ways]
    return f"{table(head, body)}\n{about(rows)}.\n"


# table: (its CSV, which of the rows, what makes it)
MAKERS: dict[str, tuple[str, Callable[[Row], bool], Callable[[list[Row]], str]]] = {
    "speed": ("hosts", lambda row: row["backend"] == "default", speed),
    "hosts": ("hosts", lambda row: row["backend"] != "default", hosts),
    "steps_graph": ("steps", lambda row: row["mode"] == "graph", steps),
    "steps_eager": ("steps", lambda row: row["mode"] == "eager", steps),
    "bound": ("steps", lambda row: row["mode"] == "graph", bound),
    "memory": ("memory", bool, memory),
    "growth": ("growth", lambda row: row["us"] != "", growth),
    "dit": ("dit", bool, dit),
    "dit_multires": ("dit-multires", bool, dit),
    "generations": ("generations", bool, generations),
    "multigpu": ("multigpu", bool, multigpu),
    "parallel": ("parallel", bool, parallel),
    "multires": ("multires", bool, multires),
}


def made(name: str, folder: Path = FOLDER) -> str:
    """The table of that name; empty where nothing was measured."""
    source, chosen, maker = MAKERS[name]
    rows = [row for row in read(folder / f"{source}.csv") if chosen(row)]
    return maker(rows) if rows else ""
