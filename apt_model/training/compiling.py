"""torch.compile for a model whose modules are enabled and disabled while it trains."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from apt_model.errors import SIGNALS, ConfigError, TrainingError, cause_of
from apt_model.training import subject
from apt_model.training.torch_names import require

STATES = 256
"""In which a block may be compiled in one run: what is enabled, what is frozen, with metrics or without."""


def compile_model(model: nn.Module, device: torch.device, *, whole: bool) -> None:
    """Have the parts of ``model`` compiled as they are needed; ``whole``: see :meth:`GPT.compile_parts`.

    What this process has compiled before is forgotten, of whatever model.

    Raises:
        ConfigError: torch.compile does not work here.
    """
    require(
        "trainer.compile",
        "Set trainer.compile=false",
        "torch._dynamo.config:recompile_limit",
        "torch._functorch.config:force_non_lazy_backward_lowering",
        "torch._dynamo.exc:TorchDynamoException",
    )
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor\.")  # the compiler's own affair
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = STATES
    torch._functorch.config.force_non_lazy_backward_lowering = True  # all is compiled in the forward pass
    try:
        with _undisturbed():
            torch.compile(torch.sin, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:
        raise ConfigError(
            "trainer.compile: torch.compile does not work here. It needs a C++ compiler (g++, or what CXX names), for a GPU "
            f"also Triton. Install what is missing, or set trainer.compile=false. It said: {_short(error)}"
        ) from error
    if callable(parts := getattr(model, "compile_parts", None)):
        parts(whole=whole)
    else:
        for part in subject.blocks(model) or [model]:
            part.compile(dynamic=False)


@contextmanager
def compiling() -> Iterator[None]:
    """Surround a forward pass in which something may be compiled, for its backward pass, too.

    Raises:
        TrainingError: the compiler has failed.
    """
    try:
        with _undisturbed():
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise TrainingError(
            f"torch.compile has failed. Train with trainer.compile=false. It said: {_short(error)}"
        ) from error


def eagerly() -> AbstractContextManager[Any]:
    """Return what leaves graphs unused within: validation would need as many as training, for a few batches."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep signals that ask to stop from processes that are started within: they would end a compiler.

    This process receives them at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _short(error: Exception) -> str:
    lines = cause_of(error).strip().splitlines()
    return next((line for line in lines if "error: " in line), lines[0])
