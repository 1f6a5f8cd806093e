"""An image's tokens in one attention with others (text, references, padding), which always stay.

For hosts where q, k and v are seen as the attention gets them. Methods that match nothing take keys and values of some
tokens (JointCall); those that match merge the image's part of a row and bring it back (merge_image, unmerge_image).

In one softmax with text, each image token that stands for n counts n times (Bolya et al., arXiv 2210.09461, section
3), or the text would win: log(n) is added to its logits, by a kernel of ours (kernels.attend), by parts of one weight
combined by their log-sum-exp (combine.py) or, wherever neither can be, by further channels of the heads
(core/channels.py).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..config import ToMeConfig
from ..core.failures import is_out_of_memory
from ..core.groups import spread_rows
from ..core.sampling import run_lengths
from ..core.self_token import image_of
from ..merging.plan import MultiresPlan, Plan, SamplePlan
from .combine import Part, attend_in_parts, attend_in_parts_with_lse, choose_kernel
from .multires import NOT_MULTIRES, MultiresCall, are_alike
from .self_token import loses_gradient

# Kernels of torch in whose place one call of ours is faster than theirs combined (docs/kernels.md).
_SLOWER = ("flash", "efficient")
# Heads at which the kernel that has own tokens in it is faster than cuDNN's and `self_token` behind it.
_SELF_TOKEN_HEADS = 64
# Keys that count several times stand as often among those that count once where that makes so few: it saves a call.
_FEW = 256


@dataclass(frozen=True, eq=False)
class Around:
    """What all layers of a length share.

    before, after: the tokens that are not the image's. bias: log(counts) [1, K] of all keys; None: they count alike.
    sizes: the image's keys by what they count: (places in plan.index, or None for all; the logarithm), the most
    first; None where that is not known. ones: places of keys that stand among the others as often as they count.
    """

    before: Tensor
    after: Tensor
    bias: Tensor | None
    sizes: tuple[tuple[Tensor | None, float], ...] | None
    ones: Tensor | None

    @classmethod
    def of(cls, plan: Plan, start: int, length: int, weighs: bool, keeps_self: bool = False) -> Around:
        """weighs: whether a key that stands for several tokens counts as many. keeps_self: beside it the query's own
        token."""
        index = torch.arange(length, device=plan.device)
        before, after = index[:start], index[start + plan.tokens :]
        alike = plan.even and length == plan.tokens  # alone and alike: softmax takes no notice
        if not weighs or (alike and not keeps_self):
            return cls(before, after, None, None, None)
        small, longer = plan.tokens // plan.kept, plan.tokens % plan.kept  # torch 2.11 traces no divmod
        if alike:
            return cls(before, after, None, ((None, math.log(small)),), None)
        bias = F.pad(plan.sizes[:1].log(), (len(before), len(after)))
        if plan.even:
            return cls(before, after, bias, ((None, math.log(small)),), None)
        if not isinstance(plan, SamplePlan):
            return cls(before, after, bias, None, None)
        order = run_lengths(plan.tokens, plan.kept, plan.device)[1].argsort(stable=True)
        shorter = plan.kept - longer
        groups = [(order[:shorter], shorter, small), (order[shorter:], longer, small + 1)]
        (most, _, size), (least, count, times) = groups if shorter >= longer else groups[::-1]
        if count * times <= _FEW:
            return cls(before, after, bias, ((most, math.log(size)),), least.repeat_interleave(times))
        return cls(before, after, bias, ((most, math.log(size)), (least, math.log(times))), None)

    def index(self, plan: Plan, start: int) -> Tensor:
        """The tokens whose keys stay, [K], where all rows of the batch keep the same; the image begins at `start`."""
        if len(self.before) + len(self.after) == 0:
            return plan.index[0]
        return torch.cat((self.before, plan.index[0] + start, self.after))


class JointCall:
    """What the attentions of one call of a model share. Owned by that call.

    Args:
        weighs: whether a key that stands for several tokens counts as many.
        kernels: those that the host would try, in its order (combine.choose_kernel). None of them: nothing is joined.
        say: called as say(message, detail) where a kernel refuses.
        keeps_self: whether each of the image's queries keeps its own token (core/self_token.py), where keys weigh and
            are joined.
    """

    def __init__(self, weighs: bool, kernels: Sequence[str], say: Callable[[str, str], None], keeps_self: bool = False):
        self.weighs, self.kernels, self._say = weighs, tuple(kernels), say
        self.keeps_self = keeps_self and weighs
        self._around: dict[tuple[int, int], Around] = {}
        self._chosen: dict[tuple[torch.dtype, int], str | None] = {}
        self.multires = MultiresCall(say)

    @classmethod
    def of(cls, config: ToMeConfig, kernels: Sequence[str], say: Callable[[str, str], None]) -> JointCall:
        """On a U-Net, where the attention sees the heads of all tokens: where the options want that
        (wants_heads), and where it works out a layer drawn and whole (merging/residual.py)."""
        return cls(config.wants_heads or config.weighs_keys, kernels, say, config.keeps_self)

    def around(self, plan: Plan, start: int, length: int) -> Around:
        """For a row of `length` tokens whose image begins at `start`; plan: of a method that matches nothing."""
        if (start, length) not in self._around:
            self._around[start, length] = Around.of(plan, start, length, self.weighs, self.keeps_self)
        return self._around[start, length]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: int,
        plan: Plan,
        scale: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | None:
        """One attention with keys and values of plan.index alone, each of its weight, and all other tokens.

        Args:
            q, k, v: [B, H, L, d] of all tokens. scale: of the logits; None: d ** -0.5.
            mask: see masks.mask_by_head; for plans of three resolutions alone.
        Returns:
            [B, L, H, d], or None where it cannot be done in combined parts, or need not be.
        """
        if not self.kernels:
            return None
        if isinstance(plan, MultiresPlan):
            out = self.multires.attend(q, k, v, start, plan, scale, mask)
            if out is not None:
                return out
        if mask is not None:
            return None
        around = self.around(plan, start, k.shape[2])
        if around.sizes is None or not _can_combine(q, k, v):
            return None
        kernel = self._kernel(q)
        if kernel is None:
            return None
        out = _attend_at_once(q, k, v, start, plan, around, kernel, scale, self.keeps_self)
        if out is not None:
            return out
        try:
            return attend_combined(q, k, v, start, plan, around, kernel, scale, self.keeps_self)
        except RuntimeError as error:  # what a kernel refuses on some machine; the wider heads go everywhere
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            self._say(f"the {kernel} kernel cannot combine attentions here; ToMe widens heads instead", reason)
            self.keeps_self = False
            self.kernels = ()
            return None

    def tell_sampled(self, plan: Plan, why: str) -> None:
        """To be called where an attention is not for `attend`: says it once where the plan is for three resolutions."""
        if isinstance(plan, MultiresPlan):
            self._say(NOT_MULTIRES, why)

    def tell_not_own(self, reason: str) -> None:
        """To be called where queries were to keep their own tokens, and cannot."""
        self._say(reason, "")

    def _kernel(self, q: Tensor) -> str | None:
        # A number also where layers of several sizes share a compiled function.
        key = q.dtype, operator.index(q.shape[-1])
        if key not in self._chosen:  # torch is asked once a call and not once a layer
            self._chosen[key] = choose_kernel(self.kernels, q.device, *key)
        return self._chosen[key]


def with_detail(message: str, detail: str) -> str:
    """What JointCall's `say` is told, as one line."""
    return f"{message} ({detail})" if detail else message


def _can_combine(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels that tell their log-sum-exp take these, and no gradient is lost by it."""
    if any(x.stride(-1) != 1 for x in (q, k, v)) or not are_alike(q, k, v):
        return False
    return not loses_gradient(q, k, v)


def _attend_at_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    plan: Plan,
    around: Around,
    kernel: str,
    scale: float | None,
    keeps_self: bool,
) -> Tensor | None:
    """JointCall.attend by one kernel of ours; None where none serves, or where torch's `kernel` is faster."""
    d = q.shape[-1]
    scale = d**-0.5 if scale is None else scale
    if not keeps_self:
        if kernel not in _SLOWER or not kernels.can_attend(q, k, v):
            return None
        index = plan.choice if k.shape[2] == plan.tokens else around.index(plan, start)
        out = kernels.attend(q, take_heads(k, index), take_heads(v, index), around.bias, scale)
        return out.transpose(1, 2)
    alike = around.ones is None and len(around.sizes) == 1 and isinstance(plan, SamplePlan)  # all drawn keys count so
    faster = kernel in _SLOWER or d == _SELF_TOKEN_HEADS
    if not (alike and faster and kernels.attends_drawn(q, k, v, scale)):
        return None
    out = kernels.attend_drawn(q, k, v, plan.head_draws, plan.runs, start, scale, around.sizes[0][1])
    return out.transpose(1, 2)


def attend_combined(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    plan: Plan,
    around: Around,
    kernel: str,
    scale: float | None = None,
    keeps_self: bool = False,
) -> Tensor | None:
    """JointCall.attend by one kernel; None where a part is not as it wants it: cuDNN takes no single key."""
    end = start + plan.tokens
    each_head = keeps_self and isinstance(plan, SamplePlan)
    index, chosen_of = (
        (plan.head_draws, kernels.take_by_head) if each_head else (plan.choice, _take_both)
    )  # (T, b, M) or (b, M)
    image = [image_of(x, start, plan.tokens) for x in (k, v)]
    parts: list[Part] = []
    for places, weight in around.sizes:
        chosen = index if places is None else index[..., places]
        parts.append((*chosen_of(*image, chosen), weight))
    ones = None if around.ones is None else chosen_of(*image, index[..., around.ones])
    others = []
    for number, x in enumerate((k, v)):
        pieces = [x[:, :, :start]] if start else []
        pieces += [] if ones is None else [ones[number]]
        pieces += [x[:, :, end:]] if end < x.shape[2] else []
        if pieces:
            others.append(pieces[0] if len(pieces) == 1 else _concatenate(pieces))
    if others:
        parts.append((*others, 0.0))
    if any(part[0].shape[2] < (2 if kernel == "cudnn" else 1) for part in parts):
        return None
    if not each_head:
        return attend_in_parts(q, parts, kernel, scale)
    out, lse = attend_in_parts_with_lse(q, parts, kernel, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    of_q, of_out, of_lse = (image_of(x, start, plan.tokens) for x in (q, out, lse))
    kept = kernels.add_self_token(of_q, *image, of_out, of_lse, plan.head_draws, plan.runs, scale, parts[0][2])
    out, kept = out.transpose(1, 2), kept.transpose(1, 2)  # (B, ., H, d)
    if kept.shape != out.shape:
        kept = torch.cat((out[:, :start], kept, out[:, end:]), dim=1)
    return kept.contiguous()


def _take_both(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return take_heads(k, index), take_heads(v, index)


def _rows_lie_together(x: Tensor) -> bool:
    """Whether x [B, H, L, d] is [B, L, H * d] in memory."""
    return x.stride(1) == x.shape[3] and x.stride(3) == 1


def take_heads(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of index [K], or of a list a row [b, K], of x [B, H, L, d], in one gather of whole rows where the
    memory allows."""
    batch, heads, _, d = x.shape
    index = index[None] if index.dim() == 1 else index
    if _rows_lie_together(x):
        return kernels.take(x.transpose(1, 2).flatten(2), index).unflatten(-1, (heads, d)).transpose(1, 2)
    if index.shape[0] > 1:
        return x.gather(2, spread_rows(index, batch)[:, None, :, None].expand(-1, heads, -1, d))
    if batch == 1 or x.stride(0) == heads * x.stride(1):
        return kernels.take(x.flatten(0, 1), index).unflatten(0, (batch, heads))
    return x.index_select(2, index[0])


def _concatenate(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces [B, H, ., d] one behind the other, in the memory order that they have."""
    if all(_rows_lie_together(x) for x in pieces):
        return torch.cat([x.transpose(1, 2) for x in pieces], dim=1).transpose(1, 2)
    return torch.cat(list(pieces), dim=2)


def merge_image(x: Tensor, start: int, plan: Plan) -> Tensor:
    """The image's part of x [B, L, C], which begins at `start`, merged -> [B, K, C]."""
    before, image, after = x.split((start, plan.tokens, x.shape[1] - start - plan.tokens), dim=1)
    return torch.cat((before, plan.merge(image), after), dim=1)


def unmerge_image(x: Tensor, start: int, plan: Plan) -> Tensor:
    """Back from x [B, K, C] -> [B, L, C]."""
    before, image, after = x.split((start, plan.kept, x.shape[1] - start - plan.kept), dim=1)
    return torch.cat((before, plan.unmerge(image), after), dim=1)


def image_bias(plan: Plan, start: int, length: int) -> Tensor:
    """log(sizes) [B, K] of merged keys in a row of `length` tokens whose image begins at `start`."""
    return F.pad(plan.sizes.log(), (start, length - start - plan.tokens))
