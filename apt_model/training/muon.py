"""Muon for the matrices of a model and AdamW for the rest, as one optimizer whose parameters may come and go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal, overload

import torch
from torch import Tensor, nn

from apt_model.training.optimizer import has_vocabulary
from apt_model.training.sharding import full_tensor, shared_as

COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Of the polynomial that takes singular values to about 1. Source: https://kellerjordan.github.io/posts/muon/"""

Adjust = Literal["original", "match_rms_adamw"]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices; AdamW for vectors, embeddings and the head.

    Weights of experts, (num_experts, out, in), are as many matrices: each is orthogonalised by itself, all at once. Groups
    with ``use_muon`` are Muon's; :meth:`parameter_groups` makes them for a model.

    On matrices it is ``torch.optim.Muon`` to the bit. Sources: https://kellerjordan.github.io/posts/muon/ and, for
    ``match_rms_adamw``, arXiv:2502.16982.

    Args:
        lr: of both; with ``match_rms_adamw`` an update has the size of one of AdamW's.
        weight_decay: decoupled, of both.
        momentum, nesterov: of Muon.
        ns_steps: steps of the Newton-Schulz iteration.
        adjust: how the learning rate follows a matrix's shape.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust: Adjust = "match_rms_adamw",
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            **{"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov},
            **{"ns_steps": ns_steps, "adjust": adjust, "betas": tuple(betas), "eps": eps, "use_muon": False},
        }
        super().__init__(params, defaults)

    @staticmethod
    def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Return three groups: matrices for Muon, those that have a row a token for AdamW, and vectors, which do not decay."""
        tables = has_vocabulary(model)
        parameters = list(model.parameters())
        matrices = [p for p in parameters if p.dim() >= 2]
        return [
            {"params": [p for p in matrices if p not in tables], "weight_decay": weight_decay, "use_muon": True},
            {"params": [p for p in matrices if p in tables], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make an update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._orthogonal if group["use_muon"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    @staticmethod
    def _orthogonal(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        direction = shared_as(orthogonalised(full_tensor(update), steps=group["ns_steps"]), parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * _ratio(parameter.shape, group["adjust"]))

    @staticmethod
    def _adamw(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = state["step"].item()
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        scale = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - beta1**step))


def orthogonalised(matrices: Tensor, *, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Return the nearest semi-orthogonal matrix of each of ``matrices`` (..., out, in), about: in bf16, the same shape.

    Singular values come out between 0.5 and 1.5, by a Newton-Schulz iteration of degree 5.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    if tall:
        x = x.mT
    if x.dim() == 2:  # torch's own order of operations, to the bit
        x = x / x.norm().clamp(min=eps)
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    else:
        shape = x.shape
        x = x.reshape(-1, *shape[-2:])
        x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
        for _ in range(steps):
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        x = x.reshape(shape)
    return x.mT if tall else x


def _ratio(shape: torch.Size, adjust: Adjust) -> float:
    out, width = shape[-2:]
    if adjust == "original":
        return math.sqrt(max(1, out / width))
    return 0.2 * math.sqrt(max(out, width))
