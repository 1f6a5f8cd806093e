"""The picture sets by name."""

from __future__ import annotations

from .data import DEMO, PictureSet
from .data_fine import FINE
from .data_moving import MOVING

SETS: dict[str, PictureSet] = {pictures.name: pictures for pictures in (DEMO, FINE, MOVING)}
