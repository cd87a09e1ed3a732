"""Values that a curriculum may move, as modules hold them: 0-dim buffers, written in place.

A module declares them in ``scheduled``: names of its buffers and their domains. What costs something even at its neutral
value (dropout at 0, say) is computed only where ``expected`` has its name, so that what does not move costs nothing, and
what moves is in the graph from the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from apt_model.errors import ConfigError, nearest
from apt_model.schedule.targets import Domain


def dropout(x: Tensor, p: Tensor) -> Tensor:
    """Zero each element with probability ``p`` (0-dim, below 1) and scale the rest; the same graph for every ``p``."""
    return x * (torch.rand_like(x) >= p) / (1.0 - p)


def targets(model: nn.Module) -> dict[str, Domain]:
    """Return every value of ``model`` that may be moved, by its dotted path, with its domain."""
    found: dict[str, Domain] = {}
    for path, module in model.named_modules():
        for name, domain in getattr(module, "scheduled", {}).items():
            found[f"{path}.{name}" if path else name] = domain
    return found


def setters(model: nn.Module) -> dict[str, Callable[[float], None]]:
    """Return a setter for each of :func:`targets`."""
    return {path: setter(model, path) for path in targets(model)}


def expect(model: nn.Module, paths: Iterable[str]) -> None:
    """Add ``paths`` to what the modules of ``model`` expect to move."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        if hasattr(module, "expected"):
            cast("set[str]", module.expected).add(name)


def setter(model: nn.Module, path: str) -> Callable[[float], None]:
    """Return a function that sets what ``path`` means in any module: a 0-dim buffer in place, a Python number by name.

    Raises:
        ConfigError: there is nothing of that name, or it is a Python number and ``model`` is compiled: torch.compile bakes
            such numbers in, and what it computes was measured to be late or wrong (pytorch#194976, #197889).
    """
    compiled = is_compiled(model)
    model = getattr(model, "_orig_mod", model)
    owner, _, name = path.rpartition(".")
    try:
        module = model.get_submodule(owner)
        value = getattr(module, name)
    except AttributeError:
        raise ConfigError(f"{path}: the model has nothing of that name. {nearest(path, targets(model))}") from None
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ConfigError(
                f"{path}: a curriculum moves single numbers, and this has the shape {tuple(value.shape)}."
            )
        buffer = value

        def fill(new: float) -> None:
            buffer.fill_(new)

        return fill
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{path}: a curriculum moves numbers, and this is {type(value).__name__}.")
    if compiled or is_compiled(module):
        raise ConfigError(
            f"{path}: a Python number on a compiled module: torch.compile would recompile for each value or keep an old one. "
            f'Make it a buffer: self.register_buffer("{name}", torch.tensor({float(value)}), persistent=False).'
        )
    return lambda new: setattr(module, name, new)


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``module`` or a part of it runs under torch.compile."""
    return any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )
