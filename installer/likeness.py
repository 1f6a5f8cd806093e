"""How near two saved pictures are: PSNR, SSIM, and LPIPS where its package is installed. Needs torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shared_tome.inspect import likeness


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 pictures [H, W, 3] in dB; inf when they are the same."""
    return likeness.psnr(_tensor(one), _tensor(two)).item()


def ssim(one: np.ndarray, two: np.ndarray) -> float:
    """Structural similarity of two uint8 pictures [H, W, 3]; on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return likeness.ssim(_tensor(one).to(device), _tensor(two).to(device)).item()


def _tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)[None]  # (1, 3, H, W)


class Lpips:
    """LPIPS with AlexNet (Zhang et al., arXiv 1801.03924), by the package of its authors.

    why: what keeps it from working here, "" where nothing does.
    """

    def __init__(self) -> None:
        self.why, self._net = "", None
        try:
            import lpips

            self._net: Any = lpips.LPIPS(net="alex", verbose=False).eval()
        except ImportError:
            self.why = "the package lpips is not installed"
        except Exception as error:  # it loads weights from the network, in torchvision's way
            self.why = f"lpips failed with {type(error).__name__}"  # its message may name folders

    @torch.no_grad()
    def __call__(self, one: np.ndarray, two: np.ndarray) -> float | None:
        """The distance of two uint8 pictures [H, W, 3], 0 where they are the same; None where it cannot be told."""
        if self._net is None:
            return None
        return self._net(*(_tensor(picture).float() / 127.5 - 1 for picture in (one, two))).item()
