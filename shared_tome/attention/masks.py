"""Masks under which an attention can be had at three resolutions: an image's queries see all of the image's keys.

What models of text and image make is of that kind: padding of a text ([B, 1, L]: Qwen-Image, HunyuanVideo), weights of
a text's parts for each query ([B, L, L]: regional prompts, Flux Redux). There every key keeps what the mask adds to it,
and nothing is lost by the choice of tiles, which knows no mask. Where a mask hides parts of an image from others, tiles
that a query does not see at all would be kept whole for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.curve import is_compiling
from ..core.multires import is_of_keys


def mask_by_head(mask: Tensor) -> Tensor | None:
    """A host's mask [L or 1, L], [B or 1, ...] or [B or 1, H or 1, ...] in four dimensions; None for any other."""
    if not 2 <= mask.dim() <= 4:
        return None
    mask = mask[None] if mask.dim() == 2 else mask
    return mask[:, None] if mask.dim() == 3 else mask


class SeenMasks:
    """Whether a call's masks leave its image whole. Owned by the call.

    A mask that is the same for all queries is served unseen: only padding and weights of keys are, and each key has its
    own. One for each query is read, which waits for the GPU: once a call for each shape, since hosts make it anew in
    each layer. Were the next one another, its numbers would be right all the same, and only the choice of tiles worse.
    """

    def __init__(self) -> None:
        self._whole: dict[tuple, bool] = {}

    def leaves_whole(self, mask: Tensor, start: int, tokens: int) -> bool | None:
        """Whether the image's queries see its keys. None: a mask that cannot be read now.

        mask: [B or 1, H or 1, L or 1, L]; start, tokens: where the image begins and how many tokens it has.
        """
        if is_of_keys(mask):
            return True
        key = tuple(mask.shape), mask.dtype, start, tokens
        if key not in self._whole:
            if is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
                return None
            image = mask.narrow(2, start, tokens).narrow(3, start, tokens)
            whole = image.all() if mask.dtype == torch.bool else torch.stack(image.aminmax()).eq(0.0).all()
            self._whole[key] = bool(whole)
        return self._whole[key]
