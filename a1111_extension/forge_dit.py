"""ToMe in the transformers of Forge and Forge Neo, by the rows of ComfyUI's table (comfy_tome/dit_models.py).

Their attentions take no patches. But every module of backend/nn calls its attention function by a name of its own. For
the time of one call of the model that name is answered here (swap.py), and each attention goes the way that it goes in
ComfyUI (comfy_tome/dit_call.py). Which block runs is known by hooks on the blocks. Images with seeds of their own are
merged one by one, so that each draws what it draws alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..comfy_tome.dit_attention import AttentionCall
from ..comfy_tome.dit_call import TransformerCall
from ..comfy_tome.dit_layout import Layout
from ..comfy_tome.dit_models import DIT_MODELS, DiTModel, dit_model, unwrapped, why_not
from ..comfy_tome.dit_refused import refused
from ..shared_tome import ModelCall, ToMeConfig, kernels
from ..shared_tome.attention.self_token import NO_LSE
from ..shared_tome.attention.sequence import JointCall
from ..shared_tome.autotune.layer import ALWAYS
from ..shared_tome.autotune.paying import Decision, Judge
from ..shared_tome.autotune.step import tokens_beside
from ..shared_tome.hooks.running import follow_modules
from ..shared_tome.inspect.reasons import why_not_served
from ..shared_tome.inspect.record import CallRecord
from ..shared_tome.inspect.report import CallTally
from ..shared_tome.merging.plan import Plan
from .forge_attention import FORGE, functions_at, functions_of, handed, order_of
from .hooks import NotServed
from .sampling import Sampling
from .seeds import Rows
from .swap import swapped
from .whole_step import RunMerged, WholeSteps, decision_on_model, names_of

SERVED = ", ".join(row.name for row in DIT_MODELS if row.forge)
# What is said.
NO_GRID = "ToMe skips an image whose tokens do not lie on one grid"
NOT_MET = "no attention of the model reached ToMe: another extension has replaced them, or cuts the picture into tiles"
OTHER_ROWS = "ToMe skips an attention whose rows are not the images': another extension has changed them"


def facts_of(sd_model: Any, model: nn.Module) -> DiTModel:
    """The row of a diffusion model. Raises NotServed with the reason where it has none."""
    model = unwrapped(model)
    if (known := refused(model)) is not None:
        raise NotServed(f"ToMe does not serve {known.name}: {known.reason}; nothing is merged")
    facts = dit_model(model)
    if facts is None:
        raise NotServed(
            f"{type(sd_model).__name__} ({type(model).__name__}) is not served in this program. ToMe merges models "
            f"with a U-Net here (SD 1.x, 2.x, SDXL) and {SERVED}; nothing is merged"
        )
    return facts


def check(facts: DiTModel, config: ToMeConfig) -> None:
    """Raises NotServed for options that only a U-Net has."""
    if (why := why_not(facts, config)) is not None:
        raise NotServed(f"{why}; nothing is merged")


def takes_multires(patcher: Any) -> bool:
    """Whether `auto` stands for multires on a patcher's model: a transformer, on a GPU, with PyTorch's attention."""
    model, device = unwrapped(patcher.model.diffusion_model), getattr(patcher, "load_device", None)
    if device is None or dit_model(model) is None or refused(model) is not None:
        return False
    return kernels.serves(torch.empty(0, device=device)) and bool(order_of(functions_of(model), torch.device(device)))


class Merged:
    """Calls the model with its attentions merged, for one sampling pass. base: what the patcher holds. alone: whether
    no other extension stands around the model's call; else its steps are not tried."""

    def __init__(self, base: Any, facts: DiTModel, sampling: Sampling, alone: bool):
        self._base, self._alone, self._steps = base, alone, WholeSteps(sampling)
        self._model, self._facts, self._sampling = unwrapped(base.diffusion_model), facts, sampling
        self._places, self._by_times = functions_of(self._model), sampling.config.levels == "auto"
        self._order: dict[torch.device, tuple[str, ...]] = {}

    def __call__(self, args: dict[str, Any], run: Callable[[dict], Tensor], far: Callable[[], float] | None) -> Tensor:
        """args: of the host's model_function_wrapper. run: calls the model with them. far: how far the sampler is."""
        sampling, x = self._sampling, args["input"]  # (B, C, ..., H, W)
        config = sampling.begin(x, sampling.images_of(x.shape[0]), far)
        if config.ratio == 0.0:
            return run(args)
        parts, block = sampling.parts(x.shape[0]), Block()
        config = config if self._by_times else config.replace(levels="0")  # a transformer has one resolution
        made = self._calls(args, config, parts, block)
        if not made:
            return run(args)
        with self._answered(made, x.shape[0], block):
            out = run(args)
        for (_, _, told), (_, call) in zip(parts, made, strict=True):
            call.end()
            if isinstance(told, CallRecord):
                told.end()
        return out

    @contextmanager
    def _answered(self, calls: list[tuple[slice, ForgeTransformerCall]], rows: int, block: Block) -> Iterator[None]:
        """Around a call of the model."""
        with swapped(self._places, Images(calls, rows, block)), block.follow(self._model, self._facts.blocks):
            yield

    def _calls(
        self,
        args: dict[str, Any],
        config: ToMeConfig,
        parts: list[tuple[slice, tuple[int, ...], CallTally | None]],
        block: Block,
    ) -> list[tuple[slice, ForgeTransformerCall]]:
        """What the images of a batch get, each with its rows; nothing where they are left alone."""
        facts, told, notes = self._facts, self._sampling.call_tally, self._sampling.notes
        x, arguments = args["input"], _told(self._model, args["c"])
        layout = Layout.of(facts, self._model, tuple(x.shape), arguments)
        if layout is None:
            notes.say(NO_GRID, shown=False)
            if told is not None:
                told.left_alone(NO_GRID, facts.name)
            return []
        for _, _, of_part in parts:
            if of_part is not None:
                of_part.lies_on(layout.grid)
        if x.device not in self._order:
            self._order[x.device] = order_of(self._places, x.device)
        if (reason := why_not_served(config, layout.grid, layout.grid)) is not None:
            if told is not None:
                told.lies_on(layout.grid)
                told.left_alone(reason, facts.name, layout.grid)
            return []
        tried = functools.partial(self._try_step, args, layout, layout.beside(arguments))
        verdict = self._steps.verdict(config, layout.grid, x, tried)
        if verdict.unpaid is not None and told is None:
            return []

        def made(rows: slice, images: Rows, of_part: CallTally | None) -> ForgeTransformerCall:
            call = self._sampling.call_on(layout.grid, config, x[rows], images)
            given = layout, self._order[x.device], self._sampling, block, of_part, self._by_times
            return ForgeTransformerCall(call, facts, *given, verdict.judge, verdict.unpaid)

        return [(part[0], made(*part)) for part in parts]

    def _try_step(self, args: dict[str, Any], layout: Layout, beside: int, config: ToMeConfig) -> Decision | None:
        """What is known of the times of whole steps; on one row, as layers are. beside: tokens of text and
        references."""
        keeps = layout.elsewhere > 0  # from call to call: one more would change the next ones
        if not self._alone or layout.tokens >= ALWAYS or keeps or _has_rows_elsewhere(self._model):
            return None
        order = self._order[args["input"].device]

        def merged(judge: Judge) -> RunMerged:
            sampling, block = self._sampling.tried(config), Block()

            def call(x: Tensor, options: dict[str, Any], run: Callable[[dict[str, Any]], Any]) -> Any:
                made = sampling.call_on(layout.grid, config, x, sampling.images_of(x.shape[0]))
                given = layout, order, sampling, block, None, True
                tried = ForgeTransformerCall(made, self._facts, *given, judge)
                with self._answered([(slice(None), tried)], x.shape[0], block):
                    return run(options)

            return call

        masked = args["c"].get("attention_mask") is not None
        about = [*names_of(functions_at(self._places)), tokens_beside(beside, masked)]
        return decision_on_model(self._base, args, layout.grid, 1, config, merged, order, about)


def _told(model: nn.Module, c: dict[str, Any]) -> dict[str, Any]:
    """What a call is told beside its latent. Forge Neo hands reference latents to some models by a global."""
    told = {name: value for name, value in c.items() if name != "transformer_options"}
    shared = _global_of(model)
    if not told.get("ref_latents") and shared is not None:
        told["ref_latents"] = getattr(shared, "ref_latents", None)
    return told


def _has_rows_elsewhere(model: nn.Module) -> bool:
    """Whether Forge Neo hands a model something of each row by a global (PiD's small picture), so that no row can be
    run by itself."""
    latent, *_ = getattr(_global_of(model), "lq_latent", None) or [None]
    return isinstance(latent, Tensor) and latent.shape[0] > 1


def _global_of(model: nn.Module) -> Any:
    """What Forge Neo hands to a model's own modules, or None."""
    return getattr(sys.modules.get(type(model).__module__), "dynamic_args", None)


class Block:
    """Which of a model's blocks this thread runs; told: as ComfyUI's models tell it, empty outside of all."""

    def __init__(self) -> None:
        self._running: list[dict[str, Any]] = []

    @property
    def told(self) -> dict[str, Any]:
        return self._running[-1] if self._running else {}

    def follow(self, model: nn.Module, lists: tuple[str, ...]) -> AbstractContextManager[None]:
        """Around the model's call. lists: of its blocks, see DiTModel."""
        blocks = {}
        for name, _, part in (entry.partition(".") for entry in lists):
            kind = name.removesuffix("layers").removesuffix("blocks").rstrip("_")
            for number, module in enumerate(getattr(model, name, ())):
                blocks[getattr(module, part) if part else module] = {"block_type": kind, "block_index": number}
        return follow_modules(blocks, self._running)


class Images:
    """Answers an attention function: the images' rows merged, each by its own call. batch: rows of the model's call."""

    def __init__(self, calls: list[tuple[slice, ForgeTransformerCall]], batch: int, block: Block):
        self._calls, self._batch, self._block = calls, batch, block

    def __call__(self, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        if not self._block.told:  # a refiner, before or behind the blocks
            return func(q, k, v, heads, *args, **kwargs)
        by, single = handed(func), len(self._calls) == 1
        if not single and q.shape[0] != self._batch:
            self._calls[0][1].skip(OTHER_ROWS)
            return func(q, k, v, heads, *args, **kwargs)
        found = []
        for rows, call in self._calls:
            if single:
                one = AttentionCall.of(by, q, k, v, heads, args, kwargs, family=FORGE)
            else:
                some = tuple(self._rows(value, rows) for value in args)
                named = {name: self._rows(value, rows) for name, value in kwargs.items()}
                one = AttentionCall.of(by, q[rows], k[rows], v[rows], heads, some, named, family=FORGE)
            found.append((rows, call, one, call.find(one)))
        if any(served is None for *_, served in found):  # all images' layers are alike
            return func(q, k, v, heads, *args, **kwargs)
        if single:
            return call.serve(one, *found[0][3])
        out = None
        for rows, call, one, served in found:
            part = call.serve(one, *served)
            out = part.new_empty(self._batch, *part.shape[1:]) if out is None else out
            out[rows] = part
        return out

    def _rows(self, value: Any, rows: slice) -> Any:
        """A mask's rows [B, ..., L], where it has one for each; anything else itself."""
        of_rows = isinstance(value, Tensor) and value.dim() > 2 and value.shape[0] == self._batch
        return value[rows] if of_rows else value


class ForgeTransformerCall(TransformerCall):
    """The attentions of one image's rows, or of all where they draw alike."""

    family, other = FORGE, "extension"

    def __init__(
        self,
        call: ModelCall,
        facts: DiTModel,
        layout: Layout,
        order: tuple[str, ...],
        sampling: Sampling,
        block: Block,
        record: CallTally | None,
        by_times: bool,
        judge: Judge | None = None,
        unpaid: str | None = None,
    ):
        self._sampling, self._block = sampling, block
        told = record, by_times, sampling.decided, judge, unpaid
        super().__init__(call, facts, layout, order, FORGE.order(call.seed.device), *told)

    def end(self) -> None:
        """To be called after the model's call: says it where no attention came here."""
        if not self._met:
            self.leave(NOT_MET)

    def say(self, message: str, detail: str = "") -> None:
        self._sampling.notes.say(f"{message} ({detail})" if detail else message, shown=False)

    def leave(self, reason: str, detail: str = "") -> None:
        self.say(reason, detail)
        if self._record is not None:
            self._record.left_alone(reason, self.block_name(self._block.told), self.layout.grid)

    def block(self, call: AttentionCall) -> dict[str, Any]:
        return self._block.told

    def combines(self, order: tuple[str, ...]) -> JointCall:
        config = self.call.config
        return _Joint(config.weighs_keys, order, self.say, config.keeps_self, self._sampling.tell_self_token)


class _Joint(JointCall):
    """Tells whether queries keep their own tokens. found: called with why they cannot, None where they do."""

    def __init__(
        self,
        weighs: bool,
        order: tuple[str, ...],
        say: Callable[[str, str], None],
        keeps_self: bool,
        found: Callable[[str | None], None],
    ):
        super().__init__(weighs, order, say, keeps_self)
        self._found = found

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, plan: Plan, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        wanted = self.keeps_self
        out = super().attend(q, k, v, start, plan, *args, **kwargs)
        if wanted and (out is not None or not self.keeps_self):
            self._found(None if out is not None else NO_LSE)
        return out

    def tell_not_own(self, reason: str) -> None:
        self._found(reason)
