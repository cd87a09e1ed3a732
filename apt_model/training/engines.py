"""What runs the forward and backward passes of a rank: the model alone, or replicas whose gradients are averaged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apt_model.gpt import GPT
from apt_model.training import subject


class Engine:
    """A model on one rank, alone; what the others are more than that is theirs."""

    whole_blocks: ClassVar[bool] = True  # whether a compiler can take a block in one piece

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forward: Callable[..., Any] = model
        self._had: list[tuple[int, bool]] | None = None

    def switches(self) -> Mapping[str, Callable[[bool], None]]:
        """Return what enables and disables each module of the model."""
        return subject.switches(self.model)

    def resize(self, *, at_least: int | None = None, at_most: int | None = None) -> None:
        """See :func:`apt_model.training.subject.resize`."""
        subject.resize(self.model, at_least=at_least, at_most=at_most)

    def settle(self) -> None:
        """Take up parameters that were added, removed, frozen or unfrozen; every rank calls it at the same time."""
        self.rest()
        has = [(id(parameter), parameter.requires_grad) for parameter in self.model.parameters()]
        if has != self._had:
            self._had = has
            self._settle()

    def _settle(self) -> None:
        pass

    def batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Surround the forward and backward pass of a batch; ``last``: of its update."""
        return nullcontext()

    def rest(self) -> None:
        """Come back to where an update begins: after validation, or after a backward pass that never came."""


class Replicas(Engine):
    """Every rank holds the whole model; gradients are averaged while the backward pass runs (DistributedDataParallel)."""

    def _settle(self) -> None:
        """Wrap the model anew, which also gives every rank the weights and buffers of rank 0."""
        self.forward = self.model
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            known = inspect.signature(DistributedDataParallel.__init__).parameters
            once: dict[str, Any] = {"forward_sync_buffers": False} if "forward_sync_buffers" in known else {}
            self.forward = replicas = DistributedDataParallel(
                self.model,
                gradient_as_bucket_view=True,
                # a model of somebody else's may hold the parameters of modules that are not enabled yet
                find_unused_parameters=not isinstance(self.model, GPT),
                **once,
            )
            if not once:  # before torch 2.13: it has sent the buffers once, and would with each forward pass
                replicas.broadcast_buffers = False

    def batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Average gradients after the last batch of an update only."""
        if last or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()
