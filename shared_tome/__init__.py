"""Token Merging: the core. Imports torch alone and knows no host."""

from .attention import attend
from .call import ModelCall
from .config import METHODS, ToMeConfig
from .matching import match_tokens
from .plan import Plan

__all__ = ["METHODS", "ModelCall", "Plan", "ToMeConfig", "attend", "match_tokens"]
