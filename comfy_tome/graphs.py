"""How a compiled model notices ToMe that passes its wrappers no keyword (dit_models.py, `compiles`).

Two things are needed. The graph that was made without ToMe must not be taken: torch.compile compares the classes of the
torch function modes that are on, in every frame that it compiles (TORCH_FUNCTION_STATE in torch/_dynamo/guards.py), and
no filter of other guards drops that. So each call runs under a mode of our own, which does nothing. And nothing of ToMe
may be fixed in the graph: some of these models are compiled block by block, and blocks that are alike share one graph.
So the attention runs outside of it, as without the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import BaseTorchFunctionMode

COMPARES_MODES = hasattr(torch._C._dynamo.guards, "TORCH_FUNCTION_MODE_STACK")
"""Whether this torch does: 2.3 does not, 2.9 does."""


class WithToMe(BaseTorchFunctionMode):
    """A context in which compiled code runs by graphs that were made in it."""


def outside(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which torch.compile calls and does not look into."""
    return torch.compiler.disable(attention)
