"""torch.compile for a model whose modules come and go while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from apt_model.errors import ConfigError, TrainingError, cause_of
from apt_model.gpt import GPT

STATES = 256
"""In which a block may be compiled in one run: what is on, what is frozen, with metrics or without."""


def compile_model(model: GPT, device: torch.device, *, whole: bool) -> None:
    """Have the parts of ``model`` compiled as they are needed; ``whole``: see :meth:`GPT.compile_parts`.

    Graphs of models that this process has trained before are forgotten.

    Raises:
        ConfigError: torch.compile does not work here.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor\.")  # the compiler's own affair
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = STATES
    try:
        torch.compile(torch.sin, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:
        raise ConfigError(
            "trainer.compile: torch.compile does not work here. It needs a C++ compiler (g++, or what CXX names), for a GPU "
            f"also Triton. Install what is missing, or set trainer.compile=false. It said: {_short(error)}"
        ) from error
    model.compile_parts(whole=whole)


@contextmanager
def compiling() -> Iterator[None]:
    """Surround a forward pass in which something may be compiled.

    Raises:
        TrainingError: the compiler has failed.
    """
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise TrainingError(
            f"torch.compile has failed. Train with trainer.compile=false. It said: {_short(error)}"
        ) from error


def eagerly() -> AbstractContextManager[Any]:
    """Return what leaves graphs unused within: validation would need as many as training, for a few batches."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _short(error: Exception) -> str:
    return cause_of(error).strip().splitlines()[0]
