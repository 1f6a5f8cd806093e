"""What the front door and the kernels behind it both go by."""

from __future__ import annotations

import logging
import re

import torch

log = logging.getLogger("ToMe")

# Of torch's operators; one for each copy of the package in a process: hosts load it under names of their own.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])
# src of a row that the kernel `select` holds in one program.
SELECTED = 8192
# What the attention kernels take, and what all others do.
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32)
