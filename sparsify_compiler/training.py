"""What an attached model carries into the user's own training loop: values to look at, terms of the loss, numbers that move by schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from .anew import Anew, Foreign, forget
from .decision import Decision
from .errors import InputError
from .masked import Masked
from .packed import Packed
from .passes_api import Context, Pass, Preserves
from .program import Region, Site

KNOWN = "known in training"  # statistics of the calibration that a pass needs while it acts there: name -> tensor
Layer = tuple[Callable[[], Tensor], Tensor] | Packed  # of a trained module: its weight as it is by now, and its mask; or both in a storage format
LOWEST = -1e9  # a score that stands for minus infinity, and has gradients
META = "training"  # in a node's metadata: the passes that act on it in training


class EndsHereError(Exception):
    """A forward pass has come to where it was to end. Caught by who asked for it."""


class Watch(nn.Module):
    """Stands in the graph and keeps the value that went by last, with its gradient's graph. It is no part of the model's state.

    ends  a forward pass goes no further, by raising EndsHereError
    acts  what changes values in training alone does so now
    """

    _is_impure = True  # so that fx does not drop it as dead code

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.ends = False
        self.acts = True

    def train(self, mode: bool = True) -> Watch:
        """As the user's train() and eval() say."""
        self.acts = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> None:
        if type(x) is Tensor:  # an export of the model, which runs on stand-ins, leaves nothing here
            self.seen = [x]
            if self.ends:
                raise EndsHereError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": []}


@dataclass(frozen=True)
class Marked:
    """A value of the graph that a pass acts on in training.

    path      of the site that it belongs to
    tap       stands in the graph: a Watch keeps the value of the last forward pass, a Masked or a Packed the dense gradient
              of a weight
    tensors   argument of the node -> the parameter or buffer of the trained module that it is: the limit of a selection, weight and mask
    decision  what the passes decided at the site, if they did
    known     statistics of the calibration that the pass has kept for it
    """

    path: str
    tap: Watch | Masked | Packed
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    decision: Decision | None = None
    known: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def value(self) -> Tensor | None:
        """What went by in the last forward pass; None before the first."""
        return self.tap.seen[0] if isinstance(self.tap, Watch) and self.tap.seen else None


class Part:
    """What one pass does in training, nothing by itself. Its only state is the number of steps, which Hook keeps.

    passes  how many forward passes over one batch its loss is about
    ends    the step behind which its schedule moves nothing more; 0 where there is no such step
    """

    passes: ClassVar[int] = 1
    ends: int = 0

    def loss(self, step: int) -> Tensor | None:
        """A term of the loss for the last forward pass, or none."""
        return None

    def move(self, step: int) -> None:
        """Set what depends on the number of steps done. Called when attached, after each step, and after a state was loaded."""

    def update(self, step: int) -> Iterable[Anew]:
        """Change what is learnt. Called once after each step of the optimizer, before move(), and never when a state is loaded.

        Gives what starts anew: what an optimizer remembers of it is void.
        """
        return ()


@dataclass(frozen=True)
class TrainingPass(Pass):
    """A pass that leaves values as they are, and marks where it acts while the model is trained.

    stands  does its tap stand for the marked value, for whatever else looks at that in training?
    """

    preserves: ClassVar[Preserves] = Preserves.VALUES
    stands: ClassVar[bool] = False

    def part(self, marked: Sequence[Marked]) -> Part:
        """What acts in training on the values that run() has marked."""
        raise NotImplementedError

    def tap(self, region: Region, name: str, node: fx.Node) -> Watch | Masked:
        """What stands in the graph at a marked node, under a name of the region's module."""
        return watch(region, name, node)

    def mark(self, node: fx.Node, site: Site, ctx: Context) -> None:
        """Note in a node's metadata that this pass acts on it, once."""
        before = node.meta.get(META, ())
        if (self, site.path) not in before and ctx.spend():
            node.meta[META] = (*before, (self, site.path))


@dataclass(frozen=True)
class WatchedAttention:
    """The operands of one scaled_dot_product_attention: query [batch, heads, queries, width], key [batch, groups, keys, width], and its mask."""

    query: Watch
    key: Watch
    mask: Watch | None = None
    causal: bool = False
    scale: float | None = None

    def logs(self) -> Tensor:
        """The logarithms of the attention weights of the last forward pass, float32 [batch, heads, queries, keys]; of what is masked, very low."""
        query, key = self.query.seen[0].float(), self.key.seen[0].float()
        if query.dim() == 4 and key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if self.scale is None else self.scale)
        if self.causal:
            rows = torch.arange(scores.shape[-2], device=scores.device)[:, None]
            scores = scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) > rows, LOWEST)
        mask = self.mask.seen[0] if self.mask is not None else None
        if mask is not None:
            scores = scores.masked_fill(~mask, LOWEST) if mask.dtype == torch.bool else scores + mask.float()
        return scores.clamp_min(LOWEST).log_softmax(-1)


class Hook:
    """What the user's loop calls beside its own: `loss()` once a forward pass, `step()` after each step of the optimizer.

        model, hook = sc.attach(model, example_inputs, recipe="prosparse")
        for batch in batches:
            loss = task_loss(model(**batch)) + hook.loss()
            loss.backward()
            optimizer.step(), hook.step(optimizer), optimizer.zero_grad()

    blocks   path of each residual block -> the parameters that it computes with, but for those of blocks before it
    foreign  the parameters of the model that was attached, which no optimizer is to train in place of the module's
    """

    def __init__(self, parts: Sequence[Part], watched: Mapping[str, Marked], states: Mapping[str, Watch],
                 attentions: Mapping[str, WatchedAttention], layers: Mapping[str, Layer],
                 blocks: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self.steps, self.blocks = 0, dict(blocks)
        self._parts = tuple(part for part in parts if type(part) is not Part)
        self._watched, self._states, self._layers = dict(watched), dict(states), dict(layers)
        self._attentions = dict(attentions)
        self.foreign: Foreign | None = None
        self._move()

    @property
    def states(self) -> dict[str, Tensor]:
        """Path of each residual block -> the residual stream behind it in the last forward pass, [..., width], with gradients."""
        return {path: one.seen[0] for path, one in self._states.items() if one.seen}

    @property
    def acts(self) -> bool:
        """Is anything moved or added to the loss by step()?"""
        return bool(self._parts)

    @property
    def passes(self) -> int:
        """How often the model is to run on a batch before each backward(): 2 where a loss compares two passes, else 1."""
        return max((part.passes for part in self._parts), default=1)

    @property
    def ends(self) -> int:
        """The step behind which the schedules of the recipe's masks and the like move nothing more: a training that ends before it is too short."""
        return max((part.ends for part in self._parts), default=0)

    @contextmanager
    def ending_at(self, path: str) -> Iterator[None]:
        """Within, a forward pass ends behind this residual block, and so does the block that runs it."""
        watch = self._states[path]
        watch.ends = True
        try:
            yield
        except EndsHereError:
            pass
        finally:
            watch.ends = False

    def attentions(self) -> dict[str, Tensor]:
        """Path of each attention of the graphs -> the logarithms of its weights in the last forward pass, [batch, heads, queries, keys]."""
        return {path: one.logs() for path, one in self._attentions.items() if one.query.seen and one.key.seen}

    @property
    def masks(self) -> dict[str, Tensor]:
        """Path of each masked layer -> its mask, bool of the weight's shape: the buffer itself, not to be written to; of a packed layer a copy."""
        return {path: one.stored.mask() if isinstance(one, Packed) else one[1] for path, one in self._layers.items()}

    def mask_of(self, weight: Tensor) -> Tensor | None:
        """The mask of a parameter of the module, bool of its shape; None where it has none, or is packed, or is a part of what a mask is over."""
        return next((one[1] for one in self._layers.values() if not isinstance(one, Packed) and one[0]() is weight), None)

    def weights(self) -> dict[str, Tensor]:
        """Path of each masked layer -> its weight as a dense tensor of its own, zeros where nothing is kept: for who goes on without us."""
        with torch.no_grad():
            return {path: one.stored.decode() if isinstance(one, Packed) else one[0]() * one[1] for path, one in self._layers.items()}

    @property
    def activations(self) -> dict[str, Tensor]:
        """Path of each FFN -> what its activation gave in the last forward pass, [..., hidden], with gradients; for a loss of your own."""
        return {path: one.value for path, one in self._watched.items() if one.value is not None}

    def densities(self) -> dict[str, float]:
        """Path of each FFN -> the share of its activations that were not zero in the last forward pass."""
        return {path: float((value != 0).float().mean()) for path, value in self.activations.items()}

    def loss(self) -> Tensor:
        """The sum of what the recipe adds to the loss for the last forward pass: float32 []; 0 where it adds nothing."""
        terms = [term for part in self._parts if (term := part.loss(self.steps)) is not None]
        return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float32)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Move what depends on the number of steps: once after each step of the optimizer, however many backward passes that took.

        optimizer  where weights are dropped and grown: it forgets what it knew of those (momentum and the like becomes 0); needed where packed

        Raises InputError where the optimizer is not that of the attached module's parameters.
        """
        if optimizer is not None and self.foreign is not None:
            self.foreign.check(optimizer)
            self.foreign = None
        self.steps += 1
        with torch.no_grad():
            for part in self._parts:
                for anew in part.update(self.steps):
                    if optimizer is not None:
                        forget(optimizer, anew)
                    elif anew.needed:
                        raise InputError("packed weights have moved, and what the optimizer remembers of them has to move too", where="Hook.step",
                                         hint="call hook.step(optimizer)")
        self._move()

    def state_dict(self) -> dict[str, int]:
        """The state beside the model's own state_dict()."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where state_dict() was taken. Raises InputError for a state of something else."""
        steps = state.get("steps")
        if set(state) != {"steps"} or not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise InputError(f"this is no state of a hook: {dict(state)!r}", where="load_state_dict", hint="give what Hook.state_dict() returned")
        self.steps = steps
        self._move()

    def _move(self) -> None:
        with torch.no_grad():
            for part in self._parts:
                part.move(self.steps)


def watch(region: Region, name: str, node: fx.Node) -> Watch:
    """Put a Watch behind a node of a region's graph, under a name of the region's module."""
    made = Watch()
    region.module.add_module(name, made)
    with region.graph.inserting_after(node):
        region.graph.call_module(name, (node,))
    return made
