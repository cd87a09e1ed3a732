"""Which experts a token goes to, with what weight, and which slots are dropped when an expert is full."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.layers.counted import Counted, mean_over

Scoring = Literal["softmax", "sigmoid"]


ONE, BITS = 0x3F800000, 30
"""The bits of 1.0 in float32, and how many they are."""

COLDEST = 1e-30
"""Temperatures below are taken as this one: logits over it are still finite, and one expert has all the weight long before."""


NUDGE = 2.0**-16
"""By how much of their size rows of a router differ from those that they copy: enough that rounding does not choose."""


class Routing(NamedTuple):
    """The experts that tokens choose. ``weights`` sum to 1 over each token's ``top_k`` experts."""

    experts: Tensor  # (tokens, top_k) int64, best first
    weights: Tensor  # (tokens, top_k) float32
    log_weights: (
        Tensor  # (tokens, top_k) float32: their logarithms but for a constant of the token; exact where they are 0
    )
    probabilities: Tensor  # (tokens, num_experts) float32, sum to 1: for losses and metrics
    logits: Tensor  # (tokens, num_experts) float32, before the temperature


class Dispatch(NamedTuple):
    """The order in which slots (a token at one of its experts) are computed: by expert, dropped ones last."""

    order: Tensor  # (tokens x top_k,) int64: slots of experts 0, 1, ..., then the dropped ones
    weights: Tensor  # (tokens, top_k) float32: 0 where dropped, renormalised over what is computed
    ends: Tensor  # (num_experts,) int32: the slots of expert e end before ends[e] in order
    counts: Tensor  # (num_experts,) int64: slots that wanted expert e, dropped and rerouted ones included
    kept: Tensor  # (tokens, top_k) bool: slots that the expert they wanted took


class Router(nn.Module):
    """Top-k router, in float32 whatever autocast says.

    ``softmax``: probabilities are softmax(logits / temperature) (Switch, arXiv:2101.03961). ``sigmoid``: scores are
    sigmoid(logits / temperature), and a bias that only the choice of experts sees balances them without an auxiliary
    loss (DeepSeek-V3, arXiv:2412.19437; arXiv:2408.15664).

    Every ``granularity`` experts in a row begin with one and the same weight, so that a token that chooses one of them
    chooses them all, as long as ``top_k`` is a multiple of it (virtual groups, arXiv:2410.07524).

    Weights and probabilities come from logarithms, and experts are chosen by what no temperature rounds to 0 or 1, so that
    they are right where scores underflow or saturate.

    Experts that :meth:`resize` made of one are a family, and of a family a token takes the best one only. So copies leave the
    function as it was, and a token's cost.
    """

    bias: Tensor
    bias_step: Tensor

    def __init__(
        self, *, d_model: int, num_experts: int, top_k: int, scoring: Scoring = "softmax", granularity: int = 1
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.num_families = num_experts  # a token goes to one expert of a family at the most
        self.scoring = scoring
        self.granularity = granularity
        self.weight = nn.Parameter(torch.empty(num_experts // granularity, d_model))
        nn.init.normal_(self.weight, std=0.02)
        if granularity > 1:
            self.weight = nn.Parameter(self.weight.detach().repeat_interleave(granularity, dim=0))
        self.register_buffer("bias", torch.zeros(num_experts), persistent=scoring == "sigmoid")
        self.register_buffer("bias_step", torch.zeros(num_experts), persistent=scoring == "sigmoid")

    def forward(self, x: Tensor, temperature: Tensor, jitter: Tensor | None = None) -> Routing:
        """Choose ``top_k`` experts for each row of ``x`` (tokens, d_model).

        Args:
            temperature: 0-dim, positive.
            jitter: 0-dim; multiplies each number of ``x`` by one drawn from 1 - jitter to 1 + jitter (Switch).
        """
        with torch.autocast(x.device.type, enabled=False):
            precise = torch.promote_types(x.dtype, torch.float32)
            x = x.to(precise)
            if jitter is not None:
                x = x * (1.0 + jitter * (2.0 * torch.rand_like(x) - 1.0))
            logits = F.linear(x, self.weight.to(precise))
            scaled = logits / temperature.clamp(min=COLDEST)
            if self.scoring == "softmax":
                log_scores = scaled
                experts = self._best(scaled.detach())
            else:
                log_scores = F.logsigmoid(scaled)
                experts = self._best(_lexicographic(scaled.detach().sigmoid() + self.bias, scaled.detach()))
            chosen = log_scores.gather(-1, experts)
            return Routing(experts, chosen.softmax(dim=-1), chosen, log_scores.softmax(dim=-1), logits)

    def _best(self, keys: Tensor) -> Tensor:
        """Return the ``top_k`` experts of the largest ``keys`` (tokens, num_experts), best first; equals by whole copies."""
        if keys.shape[-1] > self.num_families:
            best, member = keys.view(keys.shape[0], -1, self.num_families).max(dim=1)
            family = self._largest(best)
            return member.gather(-1, family) * self.num_families + family
        return self._largest(keys)

    def _largest(self, keys: Tensor) -> Tensor:
        if self.granularity == 1:
            return keys.topk(self.top_k, dim=-1).indices
        return keys.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k].contiguous()

    @torch.no_grad()
    def resize(self, num_experts: int) -> None:
        """Make copies of all experts, or one of those that were copied, until there are ``num_experts``.

        Copies are off by :data:`NUDGE`, so that each gets tokens, and with them a gradient, of its own.
        """
        weight = resized(self.weight.detach(), num_experts)
        if copies := max(0, num_experts - len(self.weight)):
            noise = NUDGE * self.weight.square().mean().sqrt() * torch.randn_like(weight[:copies])
            weight[-copies:] += noise
        self.weight = nn.Parameter(weight, self.weight.requires_grad)
        self.bias = resized(self.bias, num_experts)
        self.bias_step = resized(self.bias_step, num_experts)

    @torch.no_grad()
    def plan_balance(self, counts: Tensor, rate: float) -> None:
        """Note how :meth:`balance` will move the bias: each expert's by ``rate`` towards an equal load.

        It is not moved yet: a forward pass that is computed again for its backward pass has to route as it did.

        Args:
            counts: (num_experts,) slots wanted.
        """
        load = counts.to(self.bias.dtype)
        self.bias_step.copy_(rate * torch.sign(load.mean() - load))

    @torch.no_grad()
    def balance(self) -> None:
        """Move the bias as it was planned, once."""
        self.bias += self.bias_step
        self.bias_step.zero_()


def resized(value: Tensor, number: int) -> Tensor:
    """Return ``value`` (experts, ...) for ``number`` of them: all of them again and again, or the means of such copies."""
    if number >= len(value):
        return value.repeat(number // len(value), *[1] * (value.dim() - 1))
    return value.view(-1, number, *value.shape[1:]).mean(dim=0)


def _lexicographic(first: Tensor, then: Tensor) -> Tensor:
    """Return integers in the order of ``first``, and where that is equal in the order of ``then``."""
    return (_integers(first) << 32) + _integers(then)


def _integers(values: Tensor) -> Tensor:
    """Return float32 numbers as int64 in the same order."""
    bits = values.float().view(torch.int32).long()
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def expert_capacity(capacity_factor: Tensor, *, tokens: int, top_k: int, num_experts: int) -> Tensor:
    """Return ceil(capacity factor x tokens x k / experts), the slots an expert takes: 0-dim int64.

    A millionth is taken off first, so that a factor like 1.1, which no float holds exactly, does not cost a slot.
    """
    exact = capacity_factor.double() * (tokens * top_k / num_experts)
    return (exact * (1.0 - 1e-6)).ceil().long()


def plan_dispatch(
    routing: Routing, num_experts: int, capacity: Tensor | None = None, reroute: int | None = None
) -> Dispatch:
    """Sort slots by expert; where an expert is full, its slots of least weight are dropped.

    Shapes do not depend on the routing, and nothing waits for the device.

    Args:
        capacity: slots an expert takes, 0-dim integer; None: no limit, nothing is dropped.
        reroute: tokens that lost all of their slots go where there is room: with this many slots, of equal weight, to as
            many experts in a row, a multiple of it from the first (no token left behind, arXiv:2101.03961). None: they stay
            without an expert.
    """
    tokens, top_k = routing.experts.shape
    wanted = routing.experts.flatten()
    every = torch.arange(num_experts, device=wanted.device)
    kept = torch.ones_like(routing.experts, dtype=torch.bool)
    if capacity is None:
        by_expert, order = wanted.sort(stable=True)
        begins, ends = _edges(by_expert, every)
        return Dispatch(order, routing.weights, ends.int(), ends - begins, kept)

    # by expert, then by weight: the bits of numbers from 0 to 1 are in the order of the numbers, and fit below an expert's
    below = (ONE - routing.weights.detach().flatten().float().view(torch.int32)).clamp(0, ONE)  # NaN, too
    key, order = ((wanted << BITS) + below).sort(stable=True)
    by_expert = key >> BITS
    begins, ends = _edges(by_expert, every)
    counts = ends - begins
    fits = torch.arange(len(order), device=order.device) < (begins + capacity).index_select(0, by_expert)
    kept = kept.flatten().scatter(0, order, fits).view(tokens, top_k)
    left = routing.log_weights.masked_fill(~kept, torch.finfo(routing.log_weights.dtype).min)
    weights = left.softmax(dim=-1) * kept
    owner = torch.where(kept, routing.experts, num_experts)
    if reroute is not None:
        lost = ~kept.any(dim=-1)
        room = (capacity - counts).clamp(min=0).view(-1, reroute).amin(dim=1).cumsum(0)
        place = torch.searchsorted(room, lost.cumsum(0) - 1, right=True)
        taken = (lost & (place < len(room))).unsqueeze(1)
        there = place.unsqueeze(1) * reroute + torch.arange(reroute, device=order.device)
        first, rest = owner[:, :reroute], owner[:, reroute:]
        owner = torch.cat([torch.where(taken, there, first), rest], dim=1)
        weights = torch.cat([weights[:, :reroute].masked_fill(taken, 1.0 / reroute), weights[:, reroute:]], dim=1)
    by_owner, order = owner.flatten().sort(stable=True)
    return Dispatch(order, weights, torch.searchsorted(by_owner, every, right=True, out_int32=True), counts, kept)


def _edges(ordered: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each of ``values``, all that there may be, begins and ends in ``ordered``: two (values,) int64."""
    ends = torch.searchsorted(ordered, values, right=True)
    return F.pad(ends[:-1], (1, 0)), ends


def slots_by_expert(routing: Routing, dispatch: Dispatch, counted: Counted | None) -> Tensor:
    """Return the slots of tokens that count which wanted each expert, (num_experts,) int64."""
    if counted is None:
        return dispatch.counts
    of_slots = counted.mask.unsqueeze(1).expand_as(routing.experts).long()
    return torch.zeros_like(dispatch.counts).scatter_add(0, routing.experts.flatten(), of_slots.flatten())


def balance_loss(probabilities: Tensor, counts: Tensor, top_k: int, counted: Counted | None = None) -> Tensor:
    """Return E / (k T^2) x sum over experts of (slots that wanted it x its sum of probabilities): 1.0 when balanced.

    Source: Switch, arXiv:2101.03961, for top-k.

    Args:
        probabilities: (tokens, num_experts).
        counts: (num_experts,) slots that wanted each expert, dropped ones included.
        counted: the tokens that count, of which ``counts`` are; None: all.
    """
    tokens, num_experts = probabilities.shape
    factor: Tensor | float = num_experts / (top_k * tokens**2)
    if counted is not None:
        factor = factor * counted.scale.square()
        probabilities = probabilities.where(counted.mask.unsqueeze(1), 0.0)
    return factor * (counts * probabilities.sum(dim=0)).sum()


def z_loss(logits: Tensor, counted: Counted | None = None) -> Tensor:
    """Return the mean squared logsumexp of ``logits`` (tokens, choices). Source: ST-MoE, arXiv:2202.08906."""
    return mean_over(counted, logits.logsumexp(dim=-1).square())
