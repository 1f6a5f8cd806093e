"""What holds a model's hooks goes with the model where that is copied (copy.deepcopy) or saved whole (torch.save)."""

from __future__ import annotations

import copy
from typing import Any


class Portable:
    """A copy knows all that this knows. A pickle may be loaded in another process or on another machine, so it begins
    afresh there."""

    def afresh(self) -> dict[str, Any]:
        """What a pickle has in the place of what holds in this process alone, by attribute."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **self.afresh()}

    def __deepcopy__(self, memo: dict) -> Any:
        memo[id(self)] = twin = copy.copy(self)
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin
