"""Maps of the finished pictures, added to the host's gallery."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..shared_tome.inspect.maps import draw_maps
from ..shared_tome.inspect.record import Run


@dataclass(frozen=True)
class Map:
    """number: of the picture in the whole generation, from 0; image: the map, a PIL image of the picture's size."""

    number: int
    image: Any

    @classmethod
    def of(cls, p: Any, run: Run, image: Any) -> Map:
        """The map of the picture that the host has just finished.

        image: what was sampled, before an inpainted part goes back into its whole: the tokens lie on this one.
        """
        return cls(p.iteration * p.batch_size + p.batch_index, draw(run, image, p.batch_index))


def draw(run: Run, image: Any, row: int) -> Any:
    """A PIL image with the tokens of the finest merged layer over it. row: of the batch, from 0."""
    from PIL import Image

    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    pixels = pixels.reshape(1, image.height, image.width, 3).float() / 255
    batch = pixels.expand(run.images, -1, -1, -1)
    drawn = draw_maps(run, batch, [row], level=-1, layer=0, step=-1, show="groups", opacity=0.6, legend=True)[0]
    return Image.frombytes("RGB", image.size, (drawn * 255).round().to(torch.uint8).numpy().tobytes())


def add(processed: Any, maps: Iterable[Map]) -> None:
    """Put maps after all pictures, each with its picture's text; the host saves to disk what it made itself."""
    first = processed.index_of_first_image  # a grid comes before the pictures
    for made in maps:
        texts = processed.infotexts
        place = first + made.number
        text = texts[place] if place < len(texts) else processed.info
        texts += [processed.info] * (len(processed.images) - len(texts))  # masks that the host shows have none
        processed.images.append(made.image)
        texts.append(text)
