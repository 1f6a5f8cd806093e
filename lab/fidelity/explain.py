"""Draws docs/how-it-works.md's pictures with the core's own plans: `python -m lab.fidelity.explain --out docs/images`.

Needs matplotlib and scikit-image (a photograph).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared_tome import ModelCall, Plan, ToMeConfig
from shared_tome.core.curve import curve_order
from shared_tome.core.noise import key
from shared_tome.core.partition import partition
from shared_tome.merging.match import match_tokens

SIDE, PIXELS = 16, 16  # tokens a side, pixels a side of each
PAPER, INK, ACCENT = "#fbfbf9", "#22262b", "#d55e00"
GRID = (SIDE, SIDE)


def photograph() -> np.ndarray:
    """A cat, [SIDE * PIXELS, SIDE * PIXELS, 3], 0 to 1."""
    from skimage import data, transform

    cat = data.chelsea()[:, 75:375] / 255.0
    return transform.resize(cat, (SIDE * PIXELS, SIDE * PIXELS), anti_aliasing=True)


def features(picture: np.ndarray) -> Tensor:
    """What stands for the model's tokens here: each patch's colours and, as a model's tokens too know where they lie,
    a little of its place; with their mean taken off [1, N, C]."""
    small = torch.from_numpy(picture).float().permute(2, 0, 1)[None]  # (1, 3, H, W)
    small = torch.nn.functional.adaptive_avg_pool2d(small, (SIDE * 2, SIDE * 2))
    patches = torch.nn.functional.pixel_unshuffle(small, 2).flatten(2).transpose(1, 2)  # (1, N, 12)
    place = torch.linspace(-1, 1, SIDE)
    place = torch.cartesian_prod(place, place)[None]  # (1, N, 2)
    return torch.cat((patches - patches.mean(dim=1, keepdim=True), 0.8 * place), dim=-1)


def by_token(values: Tensor, picture: np.ndarray) -> np.ndarray:
    """One value for each token [N] -> one for each pixel [H, W]."""
    return np.kron(values.reshape(SIDE, SIDE).numpy(), np.ones((PIXELS, PIXELS)))


def dimmed(picture: np.ndarray, kept: Tensor) -> np.ndarray:
    """The picture with the tokens that are not kept (indexes [M]) faded."""
    stays = torch.zeros(SIDE * SIDE).scatter(0, kept, 1.0)
    mask = by_token(stays, picture)[..., None]
    return picture * mask + (0.86 + 0.1 * picture) * (1 - mask)


def means(picture: np.ndarray, plan: Plan) -> np.ndarray:
    """Each group of tokens in its mean colour."""
    flat = torch.from_numpy(picture).float().permute(2, 0, 1)[None]
    colours = torch.nn.functional.adaptive_avg_pool2d(flat, GRID).flatten(2).transpose(1, 2)  # (1, N, 3)
    merged = plan.unmerge(plan.merge(colours))[0]  # (N, 3)
    return np.stack([by_token(merged[:, i], picture) for i in range(3)], axis=-1)


def middle(index: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates (x, y) of tokens."""
    return (index % SIDE * PIXELS + PIXELS / 2 - 0.5).numpy(), (index // SIDE * PIXELS + PIXELS / 2 - 0.5).numpy()


def panels(titles: Sequence[str]):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(titles), figsize=(3.3 * len(titles), 3.75), facecolor=PAPER)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, color=INK, fontsize=11, loc="left")
        axis.set_axis_off()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.88, bottom=0.02, wspace=0.06)
    return figure, axes


def grid_lines(axis) -> None:
    for i in range(SIDE + 1):
        axis.axhline(i * PIXELS - 0.5, color=PAPER, linewidth=0.6)
        axis.axvline(i * PIXELS - 0.5, color=PAPER, linewidth=0.6)


def draw_sample(picture: np.ndarray, path: Path) -> None:
    """sample: the curve, its runs, and what two layers that follow each other attend to."""
    figure, axes = panels(
        [f"{SIDE * SIDE} tokens", "a curve, cut into runs of four", "keys and values of one layer", "of the next layer"]
    )
    order = curve_order(GRID, torch.device("cpu"))
    call = ModelCall(ToMeConfig(ratio=0.75, method="sample", min_tokens=0, start=0.0), GRID, torch.device("cpu"))
    plans = [call.plan(features(picture), GRID) for _ in range(2)]
    axes[0].imshow(picture)
    axes[1].imshow(0.75 + 0.25 * picture)
    for run, (x, y) in enumerate(zip(*(part.reshape(-1, 4) for part in middle(order)), strict=True)):
        axes[1].plot(x, y, color=("#0072b2", ACCENT)[run % 2], linewidth=2.2, solid_capstyle="round")
    axes[1].plot(*middle(order), color=INK, linewidth=0.5)
    for axis, plan in zip(axes[2:], plans, strict=True):
        axis.imshow(dimmed(picture, plan.index[0]))
    for axis in axes:
        grid_lines(axis)
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 88})


def draw_merge(picture: np.ndarray, path: Path) -> None:
    """merge: dst, who goes to whom, and what is left."""
    figure, axes = panels(
        [
            "a dst in each 2x2 cell",
            "the most similar half finds its dst",
            "what stands for whom",
            "the mean of each group",
        ]
    )
    config = ToMeConfig(ratio=0.5, method="merge", min_tokens=0, start=0.0)
    metric = features(picture)
    plan = match_tokens(metric, GRID, config, seed=0)
    _, dst = partition(GRID, config, key(torch.zeros((), dtype=torch.int64), 0, 0, 1))
    representative = plan.index[0][plan.groups[0]]  # (N,)
    goes = (representative != torch.arange(SIDE * SIDE)).nonzero()[:, 0]
    axes[0].imshow(dimmed(picture, dst[0]))
    axes[1].imshow(0.7 + 0.3 * picture)
    (x, y), (to_x, to_y) = middle(goes), middle(representative[goes])
    axes[1].quiver(
        x, y, to_x - x, to_y - y, angles="xy", scale_units="xy", scale=1, width=0.005, color=INK, headwidth=5
    )
    axes[1].plot(*middle(dst[0]), "o", color=ACCENT, markersize=3.5)
    colour = torch.from_numpy(np.random.default_rng(3).permutation(plan.kept))[plan.groups[0]]
    sizes = plan.sizes[0][plan.groups[0]]
    shown = torch.where(sizes > 1, colour.double(), torch.nan)
    axes[2].imshow(picture)
    axes[2].imshow(by_token(shown, picture), cmap="hsv", alpha=0.55)
    axes[3].imshow(means(picture, plan))
    for axis in axes:
        grid_lines(axis)
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 88})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.fidelity.explain", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for how-sample.jpg and how-merge.jpg")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    picture = photograph()
    draw_sample(picture, out / "how-sample.jpg")
    draw_merge(picture, out / "how-merge.jpg")


if __name__ == "__main__":
    main()
