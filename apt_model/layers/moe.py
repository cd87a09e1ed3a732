"""A feed-forward layer that is dense until it is enabled, and a sparse mixture of experts after."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from apt_model.errors import ConfigError
from apt_model.layers import cpu_experts
from apt_model.layers.backend import computing_dtype, eager_on_cpu
from apt_model.layers.counted import Counted, mean_over
from apt_model.layers.feed_forward import Experts, FeedForward, as_dense, as_experts
from apt_model.layers.router import (
    Dispatch,
    Router,
    Routing,
    Scoring,
    balance_loss,
    expert_capacity,
    plan_dispatch,
    resized,
    slots_by_expert,
    z_loss,
)
from apt_model.layers.scheduled import dropout
from apt_model.layers.tally import tally
from apt_model.layers.upcycling import Upcycling, make_different
from apt_model.schedule.targets import BELOW_ONE, OF_EXPERTS, Domain

Overflow = Literal["reroute", "drop"]
BalanceScope = Literal["global", "micro"]


class Lineage(NamedTuple):
    """A parameter that appeared, the one it took over from, and the scale of the gradients it will see."""

    child: nn.Parameter
    parent: nn.Parameter
    gradient_scale: float
    shaped: Callable[[Tensor], Tensor]  # what is of the parent's shape, as it is for the child


class MoEReport(NamedTuple):
    """What a layer reports of a forward pass: its loss, weighted, and if asked its :func:`~.tally.tally`."""

    loss: Tensor
    sums: Tensor | None
    counts: Tensor  # (num_experts,) int64: slots of tokens that count which wanted each expert, dropped ones included
    shares: Tensor | None  # (num_experts,): mean probabilities, where the loss lacks the balance of the whole update


class MoE(nn.Module):
    """Feed-forward layer with a switch.

    Disabled, it is ``dense``, and there are no other parameters. :meth:`enable` replaces the dense layer by ``num_experts``
    copies and a router: as the weights of a token's experts sum to 1, the function stays the same, whatever the
    temperature and the capacity. Switching off folds the experts into their mean.

    With a ``granularity`` of g, an expert is one of the g slices of a copy along d_ff, and g experts in a row are a copy.
    A token's experts begin as whole copies, because the router begins with one weight for all slices of a copy, and
    their weights sum to g; so the function stays the same here, too. From then on each expert goes its own way.

    :meth:`resize` copies experts where they are enabled already, which leaves the function as it was, too.

    Args:
        dense: the layer to begin with.
        num_experts: experts to come, slices counted singly: a multiple of ``granularity``.
        top_k: experts a token goes to, counted the same way: a multiple of ``granularity``.
        granularity: d_ff of the dense layer over that of an expert, which it divides.
        upcycling: what makes experts differ when they begin; only ``copy`` leaves the function as it was.
        upcycling_share: how much; see :func:`apt_model.layers.upcycling.make_different`.
        capacity_factor: slots of an expert over its equal share, in training; None: no limit (dropless).
        eval_capacity_factor: the same in evaluation; None: no limit, so that no token depends on others of its batch.
        overflow: what becomes of a token whose experts are all full: ``reroute`` has a copy serve it that has room, ``drop``
            leaves it out. Only the first keeps the function where the switch meets an uneven router.
        temperature: divides the router's logits.
        router: how logits become scores, ``softmax`` or ``sigmoid``.
        balance_loss_weight, z_loss_weight: weights of the auxiliary losses.
        bias_update_rate: step of the ``sigmoid`` router's balancing bias, at each :meth:`balance`.
        balance_scope: what the balance loss counts slots of: ``micro``, the forward pass of a rank, or ``global``, the whole
            update; see :mod:`apt_model.layers.balance`.
        jitter: in training the router sees its input times random numbers from 1 - jitter to 1 + jitter.
        shared_expert: the dense layer stays and serves every token, half of the output; experts give the other half.
        dropout: share of the output's channels that training drops.

    Sources: sparse upcycling arXiv:2212.05055, Switch arXiv:2101.03961, shared and fine-grained experts arXiv:2401.06066,
    granularity arXiv:2402.07871, its upcycling by virtual groups arXiv:2410.07524.
    """

    scheduled: ClassVar[dict[str, Domain]] = {**OF_EXPERTS, "dropout": BELOW_ONE}
    temperature: Tensor
    capacity_factor: Tensor
    eval_capacity_factor: Tensor | None
    balance_loss_weight: Tensor
    z_loss_weight: Tensor
    jitter: Tensor
    dropout: Tensor

    def __init__(
        self,
        dense: FeedForward,
        *,
        num_experts: int,
        top_k: int = 2,
        granularity: int = 1,
        upcycling: Upcycling = "copy",
        upcycling_share: float | None = None,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = None,
        overflow: Overflow = "reroute",
        temperature: float = 1.0,
        router: Scoring = "softmax",
        balance_loss_weight: float = 0.01,
        z_loss_weight: float = 0.001,
        bias_update_rate: float = 0.001,
        balance_scope: BalanceScope = "micro",
        jitter: float = 0.0,
        shared_expert: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts = self.num_families = num_experts
        self.top_k = top_k
        self.granularity = granularity
        self.upcycling: Upcycling = upcycling
        self.upcycling_share = upcycling_share
        self.dropless = capacity_factor is None
        self.overflow: Overflow = overflow
        self.scoring: Scoring = router
        self.bias_update_rate = bias_update_rate
        self.balance_scope: BalanceScope = balance_scope
        self.driven = False  # whether somebody says where an update begins and ends; else each forward pass is one
        self.counts: Tensor | None = None  # (num_experts,) int64: of the update so far, as in a report, on this rank
        self.load: Tensor | None = None  # (num_experts,): shares of all of the update's slots, if they are known before
        self.over_ranks: Callable[[Tensor], Tensor] | None = None  # returns a tensor's sum over ranks
        self.shared_expert = shared_expert
        self.dense: FeedForward | None = dense
        self.router: Router | None = None
        self.experts: Experts | None = None
        self.lineage: list[Lineage] = []
        given = {"jitter": jitter, "dropout": dropout, "balance_loss_weight": balance_loss_weight}
        self.expected = {name for name, value in given.items() if value}
        for name, value in (
            ("temperature", temperature),
            ("capacity_factor", capacity_factor or 1.0),
            ("balance_loss_weight", balance_loss_weight),
            ("z_loss_weight", z_loss_weight),
            ("jitter", jitter),
            ("dropout", dropout),
        ):
            self.register_buffer(name, torch.tensor(float(value)), persistent=False)
        evaluation = None if eval_capacity_factor is None else torch.tensor(float(eval_capacity_factor))
        self.register_buffer("eval_capacity_factor", evaluation, persistent=False)

    @property
    def enabled(self) -> bool:
        """Whether the layer is a mixture of experts now."""
        return self.experts is not None

    def enable(self, on: bool) -> None:
        """Switch between the dense layer and experts; ``lineage`` then says whose optimizer state new parameters take.

        Of n copies of the dense layer each sees about 1/n of its gradient (1/2n beside a shared expert).
        """
        if on and self.dense is not None and self.experts is None:
            self._split(self.dense)
        elif not on and self.experts is not None:
            self._fold(self.experts)

    def _split(self, dense: FeedForward) -> None:
        """Put copies of ``dense`` in its place, or beside it as a shared expert."""
        before = dict(dense.named_parameters())
        self.experts = Experts(dense, self.num_experts, self.granularity).train(self.training)
        make_different(self.experts, self.upcycling, self.upcycling_share)
        router = Router(
            d_model=dense.up.shape[1],
            num_experts=self.num_families,
            top_k=self.top_k,
            scoring=self.scoring,
            granularity=self.granularity,
        )
        router.resize(self.num_experts)
        precise = torch.promote_types(dense.up.dtype, torch.float32)
        self.router = router.to(dense.up.device, precise).train(self.training)
        half = 0.5 if self.shared_expert else 1.0
        shaped = partial(as_experts, num_experts=self.num_experts, granularity=self.granularity)
        self.lineage = [
            Lineage(weight, before[name], half * self.granularity / self.num_experts, partial(shaped, name=name))
            for name, weight in self.experts.named_parameters()
        ]
        if self.shared_expert:
            self.lineage += [Lineage(weight, weight, half, _as_it_is) for weight in dense.parameters()]
        else:
            self.dense = None

    def resize(self, number: int) -> None:
        """Have more experts, copies of those that are there, or fewer, the means of such copies; ``lineage`` says of which.

        Copies of one are a family, of which a token takes the best: see :class:`Router`. The parts of a token's output and
        their weights stay what they were. Only with a capacity more tokens may be dropped, until each copy has its half.

        Raises:
            ConfigError: one number is no multiple of the other.
        """
        if number % self.num_families or (number % self.num_experts and self.num_experts % number):
            raise ConfigError(
                f"{self.num_experts} experts cannot become {number}: each is copied as often as the others. Choose a multiple, "
                f"such as {2 * self.num_experts}."
            )
        before, self.num_experts = self.num_experts, number
        if number == before or self.experts is None or self.router is None:
            return
        shaped = partial(resized, number=number)
        old = dict(self.experts.named_parameters()) | {"router": self.router.weight}
        for name, weight in self.experts.named_parameters():
            setattr(self.experts, name, nn.Parameter(shaped(weight.detach()), weight.requires_grad))
        self.router.resize(number)
        new = dict(self.experts.named_parameters()) | {"router": self.router.weight}
        self.lineage = [Lineage(new[name], old[name], before / number, shaped) for name in old]

    def _fold(self, experts: Experts) -> None:
        """Put one dense layer in the place of the experts: their mean, with the shared expert an equal part of it."""
        before = dict(experts.named_parameters())
        _, width, d_model = before["up"].shape
        d_ff = width * self.granularity
        dense = self.dense or FeedForward(d_model=d_model, d_ff=d_ff, ffn=experts.ffn, bias="up_bias" in before)
        dense = dense.to(before["up"].device, before["up"].dtype)
        shaped = partial(as_dense, granularity=self.granularity)
        with torch.no_grad():
            for name, weight in dense.named_parameters():
                mean = shaped(before[name], name=name)
                if name == "down_bias":
                    mean = mean * self.granularity
                weight.copy_((weight + mean) / 2 if self.shared_expert else mean)
        self.lineage = [
            Lineage(weight, weight, 2.0, _as_it_is)
            if self.shared_expert
            else Lineage(weight, before[name], self.num_experts / self.granularity, partial(shaped, name=name))
            for name, weight in dense.named_parameters()
        ]
        self.dense = dense.train(self.training)
        self.experts = self.router = None

    def balance(self) -> None:
        """Move the ``sigmoid`` router's bias by what the last update, or forward pass in training, had too much or little of."""
        if self.router is not None and self.scoring == "sigmoid":
            self.router.balance()

    def plan_balance(self, counts: Tensor) -> None:
        """Note how :meth:`balance` will move the bias, by the slots of an update that wanted each expert."""
        if self.router is not None and self.scoring == "sigmoid":
            self.router.plan_balance(counts, self.bias_update_rate)

    def forward(
        self, x: Tensor, with_metrics: bool = True, counted: Counted | None = None
    ) -> tuple[Tensor, MoEReport | None]:
        """Map ``x`` (batch, seq, d_model) to the same shape.

        Args:
            with_metrics: whether the report, which there is where experts are enabled, has sums.
            counted: positions (batch, seq) that losses and metrics are of; None: all.
        """
        output, report = self._forward(x, with_metrics, counted)
        if self.training and "dropout" in self.expected:
            output = dropout(output, self.dropout)
        return output, report

    def _forward(self, x: Tensor, with_metrics: bool, counted: Counted | None) -> tuple[Tensor, MoEReport | None]:
        if self.experts is None or self.router is None:
            assert self.dense is not None
            return self.dense(x), None
        rows = x.reshape(-1, x.shape[-1])
        jitter = self.jitter if self.training and "jitter" in self.expected else None
        routing: Routing = self.router(rows, self.temperature, jitter)
        capacity = self._capacity(rows.shape[0])
        reroute = self.granularity if self.overflow == "reroute" else None
        dispatch = plan_dispatch(routing, self.num_experts, capacity, reroute)
        output = self._mix(rows, dispatch, dropless=capacity is None).view_as(x)
        if self.shared_expert:
            assert self.dense is not None
            output = (output + self.dense(x)) / 2
        counted = None if counted is None else counted.flat()
        counts = slots_by_expert(routing, dispatch, counted)
        if self.training:
            self.plan_balance(counts)
        return output, self._report(routing, dispatch, counts, counted, x.shape[0] if with_metrics else None)

    def _capacity(self, tokens: int) -> Tensor | None:
        """Return the slots that an expert takes of a forward pass on so many tokens, 0-dim; None: no limit."""
        factor = None if self.dropless else self.capacity_factor
        if not self.training:
            factor = self.eval_capacity_factor
        if factor is None:
            return None
        return expert_capacity(factor, tokens=tokens, top_k=self.top_k, num_experts=self.num_experts)

    def _mix(self, rows: Tensor, dispatch: Dispatch, *, dropless: bool) -> Tensor:
        """Compute slots in their order and add each token's, weighted: (tokens, d_model)."""
        assert self.experts is not None
        weights = dispatch.weights * self.granularity if self.granularity > 1 else dispatch.weights
        if eager_on_cpu(rows):
            rows = rows.to(computing_dtype(rows))
            where = cpu_experts.places(dispatch, rows.dtype)
            return cpu_experts.combine(self.experts(cpu_experts.gather(rows, where), where.ends), weights, where)
        token = dispatch.order // self.top_k
        inputs = rows.index_select(0, token)
        if not dropless:  # past the last end nothing is defined: keep it out of both passes
            computed = (torch.arange(token.shape[0], device=token.device) < dispatch.ends[-1]).unsqueeze(1)
            inputs = inputs.where(computed, 0.0)
        slots = self.experts(inputs, dispatch.ends)
        if not dropless:
            slots = slots.where(computed, 0.0)
        weights = weights.reshape(-1).index_select(0, dispatch.order).unsqueeze(1)
        mixed = torch.zeros(rows.shape, dtype=weights.dtype, device=rows.device)
        return mixed.index_add(0, token, slots.to(weights.dtype) * weights).to(slots.dtype)

    def _report(
        self,
        routing: Routing,
        dispatch: Dispatch,
        counts: Tensor,
        counted: Counted | None,
        num_sequences: int | None,
    ) -> MoEReport:
        """Return the loss, and the sums where ``num_sequences`` says how many sequences they are of."""
        shares = sums = None
        if self.training and self.balance_scope == "global":
            # the loads come later: a pass that is computed again has no part in them
            shares, balance = mean_over(counted, routing.probabilities, dim=0), torch.zeros((), device=counts.device)
        else:
            balance = balance_loss(routing.probabilities, counts, self.top_k, counted)
        z = z_loss(routing.logits, counted)
        if num_sequences is not None:
            sums = tally(
                routing,
                dispatch,
                num_sequences=num_sequences,
                balance=balance,
                z=z,
                counts=counts,
                counted=counted,
            )
        return MoEReport(self.balance_loss_weight * balance + self.z_loss_weight * z, sums, counts, shares)


def _as_it_is(value: Tensor) -> Tensor:
    return value
