"""The front door to what merging does between the matrix products. It always returns a result.

By a Triton kernel where one serves; by the specification in core/, plain torch, where none does: no CUDA device, no
triton, gradients asked for, or the switch says "reference" (TOME_KERNELS, use). A kernel that does not compile for a
device says so once in the log, and plain torch takes over for good on that device. Under torch.compile each kernel is
one custom operator, so it breaks no graph and no new seed or step needs another one.
"""

# ruff: noqa: F401  (these are the names behind the front door)

from .heads import (
    add_self_token,
    attend,
    attend_drawn,
    attend_multires,
    attends,
    attends_drawn,
    attends_multires,
    can_attend,
    choose_multires,
    extend_heads,
    extend_one,
    holds_tiles,
    take_by_head,
    takes_multires,
)
from .switch import ready, serves, use, version
from .tokens import Chain, can_split, draw, group_sizes, has_mean, links, match, mean, split, take
