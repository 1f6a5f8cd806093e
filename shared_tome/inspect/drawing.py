"""A picture of what was merged: the tokens of one layer over the image that they made.

Host-free: tensors in, a tensor out. Pillow, which every host has, writes the legend (legend.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.grid import Grid, split_frames
from ..core.noise import mix
from ..merging.plan import Plan
from .legend import draw_legend

SHOWS = {
    "groups": "a colour for each group of tokens that became one",
    "kept tokens": "the tokens that stand for others or for themselves; the rest is dark",
}
_COLOURS = 24
_ALIKE = 0.12  # colours of neighbours are at least this far apart in OKLab, where that can be had
_PASSES = 6  # of mending neighbours that are alike; more gain nothing
_DARK = 0.05
_SEEN = (("dot", "the query"), ("plain", "whole"), ("dim", "half resolution"), ("dark", "quarter"))  # the legend's keys
_QUERY = (0.42, 0.78, 0.55)  # the legend's green


def owners(plan: Plan) -> Tensor:
    """[B, N] int32: for each token the one that stands for it, itself where it stays. All a map needs to know."""
    return plan.index.gather(1, plan.groups).to(torch.int32)


def coverage(latent: tuple[int, int], grid: Grid) -> tuple[float, float]:
    """How many rows and columns of tokens the picture spans: a grid made by halving may reach over its edge.

    latent: (height, width) that the grid was made from, by halving or in patches of 1, 2, 4, ...
    """
    return tuple(
        next((size / 2**shift for shift in range(8) if -(-size // 2**shift) == count), float(count))
        for size, count in zip(latent, grid[-2:], strict=True)
    )


def draw_map(
    image: Tensor,
    owner: Tensor,
    grid: Grid,
    *,
    frame: int = 0,
    covers: tuple[float, float] | None = None,
    show: str = "groups",
    opacity: float = 0.6,
    caption: Sequence[str] = (),
) -> Tensor:
    """The image with one layer's tokens drawn over it.

    Args:
        image: [H, W, 3], 0 to 1, of any size: tokens are rectangles of it.
        owner: [N], see owners.
        grid: (rows, columns), or (frames, rows, columns) of which `frame` is shown.
        covers: rows and columns of tokens that the image spans, see coverage; None: the whole grid.
        show: one of SHOWS. opacity: 0 to 1, of the colours or of the dark.
        caption: lines of the legend in the lower edge; none: no legend.
    Returns:
        [H, W, 3] float32 on the CPU.
    Raises:
        ValueError: shapes that do not fit, show or opacity outside their range.
    """
    frames, rows, columns = split_frames(grid)
    if image.dim() != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be [H, W, 3], got {list(image.shape)}")
    if owner.shape != (frames * rows * columns,):
        raise ValueError(f"owner must be [{frames * rows * columns}] for grid {grid}, got {list(owner.shape)}")
    if show not in SHOWS:
        raise ValueError(f"show must be one of {', '.join(SHOWS)}, got {show!r}")
    if not 0.0 <= opacity <= 1.0:
        raise ValueError(f"opacity must be a number in 0 to 1, got {opacity}")
    if not 0 <= frame < frames:
        raise ValueError(f"frame must be in 0 to {frames - 1}, got {frame}")
    tokens = Tokens(owner.detach().cpu().long(), grid, frame, image, covers)
    drawn = tokens.groups(opacity) if show == "groups" else tokens.kept(opacity)
    return draw_legend(drawn, caption, tokens.keys(show)) if caption else drawn


def token_at(x: int, y: int, size: tuple[int, int], grid: Grid, frame: int, covers: tuple[float, float]) -> int:
    """The token of a pixel (column, row) of an image of this size (height, width): its place in the grid."""
    _, rows, columns = split_frames(grid)
    row, column = _places(size[0], rows, covers[0])[y], _places(size[1], columns, covers[1])[x]
    return int((frame * rows + row) * columns + column)


class Tokens:
    """The tokens of a frame over an image [H, W, 3], and the pixels of each."""

    def __init__(self, owner: Tensor, grid: Grid, frame: int, image: Tensor, covers: tuple[float, float] | None):
        self.image = image.detach().cpu().float().clamp(0, 1)
        _, rows, columns = split_frames(grid)
        size, covers = image.shape[:2], covers or (rows, columns)
        plane = slice(frame * rows * columns, (frame + 1) * rows * columns)
        count = torch.bincount(owner, minlength=len(owner))
        own = owner == torch.arange(len(owner))
        self.owner = owner[plane].reshape(rows, columns)
        self.alone = (count[owner] == 1)[plane].reshape(rows, columns)  # a group of one: nothing happened to it
        self.stays = own[plane].reshape(rows, columns)
        # The token [H] or [W] that each row and column of pixels belongs to.
        self.row = _places(size[0], rows, covers[0])
        self.column = _places(size[1], columns, covers[1])
        self.side = min(size[0] / covers[0], size[1] / covers[1])  # of a token, in pixels

    def _pixels(self, x: Tensor) -> Tensor:
        """[rows, columns, ...] -> [H, W, ...]."""
        return x[self.row][:, self.column]

    def groups(self, opacity: float) -> Tensor:
        """Each group in a colour of its own, with borders and marks on the tokens that stay; single ones untouched."""
        colour = self._pixels(_colours(self.owner))  # (H, W, 3)
        tinted = ~self._pixels(self.alone)[..., None]
        # Light and dark of the picture stay readable through the colour.
        light = self.image.mean(-1, keepdim=True)
        out = torch.where(tinted, self.image + opacity * (colour * (0.65 + 0.35 * light) - self.image), self.image)
        out = torch.where(self._borders()[..., None], out * (1 - 0.75 * min(1.0, opacity * 1.5)), out)
        return self._marked(out, self.stays & ~self.alone)

    def seen(self, dark: Tensor, token: int, opacity: float, caption: Sequence[str] = ()) -> Tensor:
        """The picture as a query token saw it: the coarser the darker and greyer. The query is green, with a dot.

        dark: [N], 0 where a token was whole, 1 at the coarsest resolution. token: the query's place in the grid.
        """
        out = self._dimmed(opacity, self._pixels(dark[self.owner])[..., None])
        query = self.owner == token
        drawn = self._marked(torch.where(self._pixels(query)[..., None], out.new_tensor(_QUERY), out), query)
        return draw_legend(drawn, caption, _SEEN) if caption else drawn

    def kept(self, opacity: float) -> Tensor:
        """The picture where tokens stay, dark and grey where they went."""
        return torch.where(self._pixels(self.stays)[..., None], self.image, self._dimmed(opacity, 1.0))

    def _dimmed(self, opacity: float, share: Tensor | float) -> Tensor:
        """The picture, dark and grey by this share of it."""
        deep = self.image.mean(-1, keepdim=True) * (1 - opacity) * 0.6 + _DARK * opacity
        return self.image + min(1.0, opacity * 1.4) * share * (deep - self.image)

    def _marked(self, out: Tensor, tokens: Tensor) -> Tensor:
        """With a light disc in a dark rim on these tokens [rows, columns]; all of a token is light where it is tiny."""
        there = self._pixels(tokens)[..., None]
        if self.side < 5:
            return torch.where(there, 1.0, out)
        y, x = _offsets(self.row)[:, None], _offsets(self.column)[None]  # from the token's middle, in pixels
        distance = (y**2 + x**2).sqrt()[..., None]
        radius = max(1.0, self.side * 0.17)
        rim = radius + max(0.7, self.side * 0.07)
        return torch.where(there & (distance <= radius), 1.0, torch.where(there & (distance <= rim), _DARK, out))

    def _borders(self) -> Tensor:
        """[H, W]: the lines between different groups, single tokens among each other left out."""
        width = min(6, int(self.side / 8 + 0.5)) if self.side >= 3 else 0
        label = self._pixels(torch.where(self.alone, -1, self.owner))
        line = torch.zeros(label.shape, dtype=torch.bool)
        for shift in range(1, width + 1):
            # Whether the token changes within that many pixels further on.
            column, row = (place[:-shift] != place[shift:] for place in (self.column, self.row))
            line[:, :-shift] |= (label[:, :-shift] != label[:, shift:]) & column
            line[:-shift] |= (label[:-shift] != label[shift:]) & row[:, None]
        return line

    def keys(self, show: str) -> list[tuple[str, str]]:
        """(sign, what it means) for the legend, those that occur."""
        if show == "kept tokens":
            return [("plain", "stays"), ("dark", "goes")]
        groups = [] if self.alone.all() else [("colours", "a group"), ("dot", "stands for its group")]
        return groups + ([("plain", "on its own")] if self.alone.any() else [])


def _places(pixels: int, count: int, covers: float) -> Tensor:
    """[pixels]: the token of each pixel along one side."""
    middle = (torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels
    return (middle * covers).long().clamp_max(count - 1)


def _offsets(place: Tensor) -> Tensor:
    """[pixels]: how far each pixel lies from the middle of its token."""
    pixel = torch.arange(len(place), dtype=torch.float64)
    count = torch.bincount(place)
    middle = torch.zeros(len(count), dtype=torch.float64).index_add(0, place, pixel) / count
    return pixel - middle[place]


def _colours(owner: Tensor) -> Tensor:
    """[rows, columns, 3]: a colour for each group, the same in every map for the same owner unless a neighbour has one
    like it."""
    palette, lab = _palette()
    alike = torch.cdist(lab, lab) < _ALIKE  # (P, P)
    names, group = owner.unique(return_inverse=True)  # (G,), (rows, columns)
    beside = (group[:, :-1], group[:, 1:]), (group[:-1], group[1:])
    diagonal = (group[:-1, :-1], group[1:, 1:]), (group[:-1, 1:], group[1:, :-1])
    sides = torch.cat([torch.stack((a.flatten(), b.flatten())) for a, b in (*beside, *diagonal)], dim=1)
    low, high = sides.amin(0), sides.amax(0)
    pair = (low * len(names) + high)[low != high].unique()  # neighbours, each pair once
    low, high = pair // len(names), pair % len(names)
    colour = mix(names) % _COLOURS
    order = mix(names[:, None] * _COLOURS + torch.arange(_COLOURS)) / 2**32  # (G, P): which to try first
    for _ in range(_PASSES):
        clash = high[alike[colour[low], colour[high]]].unique()
        if len(clash) == 0:
            break
        taken = torch.zeros(len(names), _COLOURS)  # by how many neighbours
        taken.index_add_(0, high, alike[colour[low]].float()).index_add_(0, low, alike[colour[high]].float())
        colour[clash] = (taken + order)[clash].argmin(dim=1)
    return palette[colour[group]]


def _palette() -> tuple[Tensor, Tensor]:
    """Colours [P, 3], twelve hues in a light and a deep tone, as RGB and in OKLab (B. Ottosson, 2020)."""
    place = torch.arange(_COLOURS)
    hue = place // 2 * (2 * math.pi / (_COLOURS // 2)) + place % 2 * (math.pi / (_COLOURS // 2))
    light = torch.where(place % 2 == 0, 0.82, 0.60)
    lab = torch.stack((light, 0.17 * hue.cos(), 0.17 * hue.sin()), dim=-1)
    to_cone = torch.tensor(
        [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728], [1.0, -0.0894841775, -1.2914855480]]
    )
    to_rgb = torch.tensor(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = ((lab @ to_cone.t()) ** 3 @ to_rgb.t()).clamp(0, 1)
    rgb = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp_min(1e-8) ** (1 / 2.4) - 0.055)
    return rgb, lab
