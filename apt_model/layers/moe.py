"""A feed-forward layer that is dense until it is switched on, and a sparse mixture of experts after."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from apt_model.layers.feed_forward import Experts, FeedForward
from apt_model.layers.router import (
    Dispatch,
    Router,
    Routing,
    Scoring,
    balance_loss,
    expert_capacity,
    plan_dispatch,
    z_loss,
)
from apt_model.layers.scheduled import dropout
from apt_model.schedule.targets import BELOW_ONE, NOT_NEGATIVE, POSITIVE, Domain


class Lineage(NamedTuple):
    """A parameter that appeared, the one it took over from, and the scale of the gradients it will see."""

    child: nn.Parameter
    parent: nn.Parameter
    gradient_scale: float


class MoEReport(NamedTuple):
    """What one layer tells after a forward pass: its loss, weighted, and its metrics (detached, 0-dim)."""

    loss: Tensor
    metrics: dict[str, Tensor]


class MoE(nn.Module):
    """Feed-forward layer with a switch.

    Off, it is ``dense``, and there are no other parameters. :meth:`enable` replaces the dense layer by ``num_experts``
    copies and a router: as the weights of a token's experts sum to 1, the function stays the same, whatever the
    temperature and the capacity. Switching off folds the experts into their mean.

    Args:
        dense: the layer to begin with.
        num_experts: experts to come.
        top_k: experts a token goes to.
        capacity_factor: slots of an expert over its equal share; None: no limit (dropless).
        temperature: divides the router's logits.
        router: how logits become scores, ``softmax`` or ``sigmoid``.
        balance_loss_weight, z_loss_weight: weights of the auxiliary losses.
        bias_update_rate: step of the ``sigmoid`` router's balancing bias, once a forward pass in training.
        shared_expert: the dense layer stays and serves every token, half of the output; experts give the other half.
        dropout: share of the output's channels that training drops.

    Sources: sparse upcycling arXiv:2212.05055, Switch arXiv:2101.03961, shared experts arXiv:2401.06066.
    """

    scheduled: ClassVar[dict[str, Domain]] = {
        "temperature": POSITIVE,
        "capacity_factor": POSITIVE,
        "balance_loss_weight": NOT_NEGATIVE,
        "z_loss_weight": NOT_NEGATIVE,
        "dropout": BELOW_ONE,
    }
    temperature: Tensor
    capacity_factor: Tensor
    balance_loss_weight: Tensor
    z_loss_weight: Tensor
    dropout: Tensor

    def __init__(
        self,
        dense: FeedForward,
        *,
        num_experts: int,
        top_k: int = 2,
        capacity_factor: float | None = 1.25,
        temperature: float = 1.0,
        router: Scoring = "softmax",
        balance_loss_weight: float = 0.01,
        z_loss_weight: float = 0.001,
        bias_update_rate: float = 0.001,
        shared_expert: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.dropless = capacity_factor is None
        self.scoring: Scoring = router
        self.bias_update_rate = bias_update_rate
        self.shared_expert = shared_expert
        self.dense: FeedForward | None = dense
        self.router: Router | None = None
        self.experts: Experts | None = None
        self.lineage: list[Lineage] = []
        self.expected = {"dropout"} if dropout else set[str]()
        for name, value in (
            ("temperature", temperature),
            ("capacity_factor", capacity_factor or 1.0),
            ("balance_loss_weight", balance_loss_weight),
            ("z_loss_weight", z_loss_weight),
            ("dropout", dropout),
        ):
            self.register_buffer(name, torch.tensor(float(value)), persistent=False)

    @property
    def enabled(self) -> bool:
        """Whether the layer is a mixture of experts now."""
        return self.experts is not None

    def enable(self, on: bool) -> None:
        """Switch between the dense layer and experts; ``lineage`` then tells whose optimizer state new parameters take.

        A token reaches k of E experts with weights that sum to 1, so an expert sees about 1/E of the dense layer's
        gradient (1/2E beside a shared expert).
        """
        if on and self.dense is not None and self.experts is None:
            self._split(self.dense)
        elif not on and self.experts is not None:
            self._fold(self.experts)

    def _split(self, dense: FeedForward) -> None:
        """Put copies of ``dense`` in its place, or beside it as a shared expert."""
        before = dict(dense.named_parameters())
        self.experts = Experts(dense, self.num_experts).train(self.training)
        router = Router(d_model=dense.up.shape[1], num_experts=self.num_experts, top_k=self.top_k, scoring=self.scoring)
        precise = torch.promote_types(dense.up.dtype, torch.float32)
        self.router = router.to(dense.up.device, precise).train(self.training)
        half = 0.5 if self.shared_expert else 1.0
        self.lineage = [
            Lineage(weight, before[name], half / self.num_experts) for name, weight in self.experts.named_parameters()
        ]
        if self.shared_expert:
            self.lineage += [Lineage(weight, weight, half) for weight in dense.parameters()]
        else:
            self.dense = None

    def _fold(self, experts: Experts) -> None:
        """Put one dense layer in the place of the experts: their mean, with the shared expert an equal part of it."""
        before = dict(experts.named_parameters())
        _, d_ff, d_model = before["up"].shape
        dense = self.dense or FeedForward(d_model=d_model, d_ff=d_ff, ffn=experts.ffn).to(before["up"].device)
        with torch.no_grad():
            for name, weight in dense.named_parameters():
                mean = before[name].mean(dim=0)
                weight.copy_((weight + mean) / 2 if self.shared_expert else mean)
        self.lineage = [
            Lineage(weight, weight, 2.0)
            if self.shared_expert
            else Lineage(weight, before[name], float(self.num_experts))
            for name, weight in dense.named_parameters()
        ]
        self.dense = dense.train(self.training)
        self.experts = self.router = None

    def forward(self, x: Tensor) -> tuple[Tensor, MoEReport | None]:
        """Map ``x`` (batch, seq, d_model) to the same shape; a report when experts are on."""
        output, report = self._forward(x)
        if self.training and "dropout" in self.expected:
            output = dropout(output, self.dropout)
        return output, report

    def _forward(self, x: Tensor) -> tuple[Tensor, MoEReport | None]:
        if self.experts is None or self.router is None:
            assert self.dense is not None
            return self.dense(x), None
        rows = x.reshape(-1, x.shape[-1])
        routing: Routing = self.router(rows, self.temperature)
        capacity = None
        if not self.dropless:
            capacity = expert_capacity(
                self.capacity_factor, tokens=rows.shape[0], top_k=self.top_k, num_experts=self.num_experts
            )
        dispatch = plan_dispatch(routing, self.num_experts, capacity)
        output = self._mix(rows, dispatch).view_as(x)
        if self.shared_expert:
            assert self.dense is not None
            output = (output + self.dense(x)) / 2
        if self.training and self.scoring == "sigmoid":
            self.router.balance(dispatch.counts, self.bias_update_rate)
        return output, self._report(routing, dispatch)

    def _mix(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Compute slots in their order and add each token's, weighted: (tokens, d_model)."""
        assert self.experts is not None
        order = dispatch.order
        masked = not self.dropless  # past the last end nothing is defined: keep it out of both passes
        if masked and rows.device.type == "cpu" and not torch.compiler.is_compiling():
            order, masked = order[: int(dispatch.ends[-1])], False  # no device to wait for: leave it out at once
        token = order // self.top_k
        inputs = rows.index_select(0, token)
        if masked:
            computed = (torch.arange(token.shape[0], device=token.device) < dispatch.ends[-1]).unsqueeze(1)
            inputs = inputs.where(computed, 0.0)
        slots = self.experts(inputs, dispatch.ends)
        if masked:
            slots = slots.where(computed, 0.0)
        weights = dispatch.weights.reshape(-1).index_select(0, order).unsqueeze(1)
        mixed = torch.zeros(rows.shape, dtype=weights.dtype, device=rows.device)
        return mixed.index_add(0, token, slots.to(weights.dtype) * weights).to(slots.dtype)

    def _report(self, routing: Routing, dispatch: Dispatch) -> MoEReport:
        balance = balance_loss(routing.probabilities, dispatch.counts, self.top_k)
        z = z_loss(routing.logits)
        with torch.no_grad():
            load = dispatch.counts / dispatch.counts.sum()
            p = routing.probabilities
            metrics = {
                "moe/balance_loss": balance.detach(),
                "moe/z_loss": z.detach(),
                "moe/max_load": load.max() * self.num_experts,  # over the equal share
                "moe/load_entropy": -torch.xlogy(load, load).sum(),
                "moe/dead_experts": (dispatch.counts == 0).sum().float(),
                "moe/drop_fraction": 1.0 - dispatch.kept.float().mean(),
                "moe/dropped_tokens": 1.0 - dispatch.kept.any(dim=-1).float().mean(),
                "moe/router_entropy": -torch.xlogy(p, p).sum(dim=-1).mean(),
                "moe/top1_probability": p.max(dim=-1).values.mean(),
            }
        return MoEReport(self.balance_loss_weight * balance + self.z_loss_weight * z, metrics)
