"""Which blocks train in a step: a few, by an importance that is learnt on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .training import Hook

RESPONSE = ("writes", "change")  # last words in the names of parameters which what was added to a layer is in proportion to


class LayerChoice:
    """Lets a few blocks of an attached module train in each step; the others get no gradients, and their optimizer's moments rest.

        module, hook = sc.attach(model, batches[0], "lora")
        optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad])      # first: the choice freezes some of them
        choice = sc.LayerChoice(module, hook, chosen=4)
        for batch in batches:
            loss(module(**batch)).backward()
            optimizer.step(), hook.step(optimizer), optimizer.zero_grad()
            choice.step(lambda: loss(module(**batch)))

    A step draws the next blocks, without repetition, by the softmax of their importance. Every few steps that is learnt: several random halves of
    the blocks keep what their adapters add while that of the others is weakened, the loss is measured without gradients, and the importance of a
    kept block moves by how far the reward, exp(-loss), lies above the mean of all. (IST, arXiv:2410.11772.)

    chosen      blocks that train in a step
    every       steps between two lessons; each costs `candidates` forward passes
    candidates  random halves that are compared, at least 2
    weakened    what the adapters' response is multiplied with in the other half
    rate        of the importance
    seed        of all that is drawn

    Raises InputError where fewer than two blocks have adapters that train.
    """

    def __init__(self, module: nn.Module, hook: Hook, chosen: int, every: int = 10, candidates: int = 3, weakened: float = 0.25, rate: float = 10.0,
                 seed: int = 0) -> None:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        trained = {path: [one for one in own if one.requires_grad] for path, own in hook.blocks.items()}
        self._blocks = {path: own for path, own in trained.items() if own}
        self._responses = {path: [one for one in own if names[id(one)].rpartition("_")[2] in RESPONSE] for path, own in self._blocks.items()}
        if len(self._blocks) < 2 or not all(self._responses.values()):
            raise InputError(f"{len(self._blocks)} blocks have parameters that train, and {sum(map(bool, self._responses.values()))} have adapters",
                             where="LayerChoice", hint="attach with a recipe that adds adapters to the blocks and freezes the rest, such as lora")
        if not 1 <= chosen <= len(self._blocks) or every < 1 or candidates < 2:
            raise InputError(f"chosen lies between 1 and {len(self._blocks)}, every is 1 or more, candidates 2 or more: {chosen}, {every}, "
                             f"{candidates}", where="LayerChoice")
        self._chosen, self._every, self._candidates, self._weakened, self._rate = chosen, every, candidates, weakened, rate
        self._seed, self.steps = seed, 0
        self._importance = torch.zeros(len(self._blocks), dtype=torch.float64)
        self._choose()

    @property
    def importance(self) -> dict[str, float]:
        """Path of each block -> what was learnt of it."""
        return dict(zip(self._blocks, self._importance.tolist(), strict=True))

    @property
    def training(self) -> tuple[str, ...]:
        """The blocks that train now."""
        return tuple(path for path, own in self._blocks.items() if own[0].requires_grad)

    def step(self, measure: Callable[[], Any]) -> None:
        """Learn, if it is time, and choose the blocks of the next step. `measure` computes the loss of a batch, without a backward pass.

        Raises InputError for a loss that is not finite; nothing has changed then.
        """
        if (self.steps + 1) % self._every == 0:
            self._learn(measure)
        self.steps += 1
        self._choose()

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict() goes on from: plain numbers."""
        return {"steps": self.steps, "importance": self._importance.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where state_dict() was taken. Raises InputError for a state of something else."""
        found = state.get("importance")
        if set(state) != {"steps", "importance"} or not isinstance(found, Sequence) or len(found) != len(self._blocks):
            raise InputError(f"this is no state of a choice among {len(self._blocks)} blocks", where="LayerChoice.load_state_dict",
                             hint="give what state_dict() returned")
        self.steps, self._importance = int(state["steps"]), torch.tensor(found, dtype=torch.float64)
        self._choose()

    def _generator(self, what: int) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed * 1_000_003 + self.steps) * 2 + what)

    def _choose(self) -> None:
        odds = self._importance.softmax(0).clamp_min(torch.finfo(torch.float64).tiny)
        drawn = set(torch.multinomial(odds, self._chosen, generator=self._generator(0)).tolist())
        for number, own in enumerate(self._blocks.values()):
            for parameter in own:
                parameter.requires_grad_(number in drawn)
                if number not in drawn:
                    parameter.grad = None

    def _learn(self, measure: Callable[[], Any]) -> None:
        generator, count = self._generator(1), len(self._blocks)
        halves = [torch.randperm(count, generator=generator)[: max(1, count // 2)] for _ in range(self._candidates)]
        losses = torch.tensor([self._measured(set(half.tolist()), measure) for half in halves], dtype=torch.float64)
        if not bool(losses.isfinite().all()):
            raise InputError(f"the loss is not finite: {losses.tolist()}", where="LayerChoice.step", hint="lower the learning rate, or see the batch")
        rewards = (-losses).exp()
        for half, reward in zip(halves, rewards - rewards.mean(), strict=True):
            self._importance[half] += self._rate * reward

    @torch.no_grad()
    def _measured(self, kept: set[int], measure: Callable[[], Any]) -> float:
        """The loss while all but the kept blocks add less; they add what they did afterwards, to the bit."""
        before: list[tuple[Tensor, Tensor]] = []
        try:
            for number, responses in enumerate(self._responses.values()):
                for parameter in responses if number not in kept else ():
                    before.append((parameter, parameter.clone()))
                    parameter.mul_(self._weakened)
            torch.clear_autocast_cache()  # of the user's autocast around this, which holds copies of the weights before
            return float(measure())
        finally:
            for weakened, saved in before:
                weakened.copy_(saved)
            torch.clear_autocast_cache()
