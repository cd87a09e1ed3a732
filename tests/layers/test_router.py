from __future__ import annotations

import math

import pytest
import torch

from apt_model.layers.router import (
    Router,
    Routing,
    balance_loss,
    expert_capacity,
    plan_dispatch,
    z_loss,
)


def routing(experts: list[list[int]], weights: list[list[float]]) -> Routing:
    nothing = torch.empty(0)
    return Routing(torch.tensor(experts), torch.tensor(weights), torch.tensor(weights).log(), nothing, nothing)


def test_weights_of_the_chosen_experts_sum_to_one_and_are_the_largest() -> None:
    router = Router(d_model=8, num_experts=6, top_k=3)
    x = torch.randn(50, 8)
    chosen = router(x, torch.tensor(0.7))
    assert torch.allclose(chosen.weights.sum(dim=-1), torch.ones(50))
    assert torch.equal(chosen.experts, (x @ router.weight.T).topk(3, dim=-1).indices)


def test_the_temperature_divides_the_logits() -> None:
    router = Router(d_model=2, num_experts=3, top_k=2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
    x = torch.tensor([[1.0, 5.0]])  # logits 2, 1, 0
    for temperature in (0.5, 1.0, 2.0):
        chosen = router(x, torch.tensor(temperature))
        e = [math.exp(logit / temperature) for logit in (2.0, 1.0, 0.0)]
        assert chosen.probabilities[0].tolist() == pytest.approx([v / sum(e) for v in e])
        assert chosen.weights[0].tolist() == pytest.approx([e[0] / (e[0] + e[1]), e[1] / (e[0] + e[1])])


def test_the_router_computes_in_float32_under_autocast() -> None:
    router = Router(d_model=64, num_experts=4, top_k=2)
    x = torch.randn(10, 64)
    exact = router(x, torch.tensor(1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = router(x, torch.tensor(1.0))
    assert under.logits.dtype == torch.float32
    assert torch.equal(under.logits, exact.logits)


def test_the_bias_of_a_sigmoid_router_changes_the_choice_and_not_the_weights() -> None:
    router = Router(d_model=2, num_experts=3, top_k=2, scoring="sigmoid")
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
        router.bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    chosen = router(torch.tensor([[1.0, 0.0]]), torch.tensor(1.0))
    s0, s2 = 1 / (1 + math.exp(-2)), 0.5
    assert chosen.experts[0].tolist() == [2, 0]
    assert chosen.weights[0].tolist() == pytest.approx([s2 / (s0 + s2), s0 / (s0 + s2)])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_scores_that_underflow_or_saturate_still_choose_and_weigh_by_their_logits(scoring: str, sign: int) -> None:
    router = Router(d_model=1, num_experts=4, top_k=2, scoring=scoring)
    with torch.no_grad():
        router.weight.copy_(sign * torch.tensor([[0.5], [0.75], [1.0], [1.25]]))
    chosen = router(
        torch.tensor([[1.0]]), torch.tensor(1e-3)
    )  # logits over it are 500, 750, 1000, 1250, or their opposites
    assert chosen.experts[0].tolist() == ([3, 2] if sign == 1 else [0, 1])
    saturated = scoring == "sigmoid" and sign == 1  # all scores are 1
    assert chosen.weights[0].tolist() == ([0.5, 0.5] if saturated else [1.0, 0.0])
    assert chosen.probabilities[0].sort(descending=True).values.tolist() == (
        [0.25] * 4 if saturated else [1.0, 0, 0, 0]
    )


def test_where_the_only_expert_of_any_weight_is_full_the_next_one_has_all_of_it() -> None:
    router = Router(d_model=2, num_experts=3, top_k=2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]]))
    chosen = router(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor(1e-3))
    assert chosen.weights.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    plan = plan_dispatch(chosen, num_experts=3, capacity=torch.tensor(1), reroute=1)
    # both want 0, then 1: each takes one slot, of the first token as no weight tells them apart
    assert plan.kept.tolist() == [[True, True], [False, False]]
    assert plan.weights.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert plan.order.tolist() == [0, 1, 2, 3]
    assert plan.ends.tolist() == [1, 2, 3]  # the second token goes to the third expert


def test_balancing_raises_the_bias_of_idle_experts_and_lowers_that_of_busy_ones() -> None:
    router = Router(d_model=2, num_experts=4, top_k=1, scoring="sigmoid")
    router.plan_balance(torch.tensor([8, 4, 4, 0]), rate=0.1)
    router.balance()
    assert router.bias.tolist() == pytest.approx([-0.1, 0.0, 0.0, 0.1])


@pytest.mark.parametrize(
    ("factor", "tokens", "top_k", "experts", "slots"),
    [(1.25, 4096, 2, 8, 1280), (1.1, 4096, 2, 8, 1127), (1.1, 20, 2, 4, 11), (1.2, 100, 1, 8, 15), (0.01, 4, 1, 8, 1)],
)
def test_capacity_is_factor_times_tokens_times_k_over_experts_rounded_up(
    factor: float, tokens: int, top_k: int, experts: int, slots: int
) -> None:
    capacity = expert_capacity(torch.tensor(factor), tokens=tokens, top_k=top_k, num_experts=experts)
    assert capacity.item() == slots


def test_dispatch_sorts_slots_by_expert() -> None:
    plan = plan_dispatch(routing([[1, 0], [2, 1], [1, 2]], [[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]]), num_experts=4)
    assert plan.order.tolist() == [1, 0, 3, 4, 2, 5]  # slots are token x 2 + choice
    assert plan.ends.tolist() == [1, 4, 6, 6]
    assert plan.counts.tolist() == [1, 3, 2, 0]
    assert plan.kept.all()


def test_a_full_expert_drops_its_least_weights_and_the_rest_is_renormalised() -> None:
    # expert 1 is wanted by token 0 (0.6), token 1 (0.3), token 2 (0.8): with two slots, token 1 stays out
    plan = plan_dispatch(
        routing([[1, 0], [2, 1], [1, 2]], [[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]]),
        num_experts=3,
        capacity=torch.tensor(2),
    )
    assert plan.kept.tolist() == [[True, True], [True, False], [True, True]]
    assert plan.weights[1].tolist() == [1.0, 0.0]
    assert plan.weights[0].tolist() == pytest.approx([0.6, 0.4])
    assert plan.counts.tolist() == [1, 3, 2]
    assert plan.ends.tolist() == [1, 3, 5]
    assert plan.order.tolist() == [1, 0, 4, 2, 5, 3]  # the dropped slot, token 1's second, stands at the end


@pytest.mark.parametrize("weight", [math.nan, -math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_leave_every_slot_its_place(weight: float) -> None:
    experts = torch.tensor([[0, 3], [3, 1], [3, 2], [0, 3]])
    weights = torch.full((4, 2), 0.5).masked_fill(experts == 3, weight)
    dispatch = plan_dispatch(Routing(experts, weights, weights, weights, weights), 4, torch.tensor(2), 1)
    assert sorted(dispatch.order.tolist()) == list(range(8))
    assert dispatch.counts.tolist() == [2, 1, 1, 4]
    assert dispatch.kept.sum(dim=0).tolist() == [3, 3]  # all that two of the last expert's four leave


def test_a_token_dropped_by_all_its_experts_has_no_weight() -> None:
    plan = plan_dispatch(routing([[0], [0], [0]], [[1.0], [1.0], [1.0]]), num_experts=2, capacity=torch.tensor(1))
    assert plan.kept.sum() == 1
    assert plan.weights.squeeze(1).tolist() == [1.0, 0.0, 0.0]


def test_a_token_that_all_its_experts_turned_away_goes_where_there_is_room() -> None:
    # expert 2 takes tokens 1 and 3; tokens 0 and 4 find room at expert 0, then token 5 finds the last place at expert 1
    wanted = routing([[2], [2], [1], [2], [2], [2]], [[0.5], [0.9], [0.7], [0.6], [0.4], [0.3]])
    plan = plan_dispatch(wanted, num_experts=3, capacity=torch.tensor(2), reroute=1)
    assert plan.kept.squeeze(1).tolist() == [False, True, True, True, False, False]
    assert plan.order.tolist() == [0, 4, 2, 5, 1, 3]
    assert plan.ends.tolist() == [2, 4, 6]
    assert plan.counts.tolist() == [0, 1, 5]
    assert plan.weights.squeeze(1).tolist() == [1.0] * 6


def test_where_there_is_no_room_tokens_stay_without_an_expert() -> None:
    plan = plan_dispatch(routing([[0], [0], [0]], [[1.0]] * 3), num_experts=2, capacity=torch.tensor(1), reroute=1)
    assert plan.order.tolist() == [0, 1, 2]
    assert plan.ends.tolist() == [1, 2]
    assert plan.weights.squeeze(1).tolist() == [1.0, 1.0, 0.0]


def test_only_a_whole_copy_with_room_takes_over() -> None:
    # copies are experts 0-1, 2-3, 4-5; expert 1 is full, and so is 2 and 3: token 2 goes to 4 and 5 with its first slots
    wanted = routing([[2, 1], [3, 1], [2, 3]], [[0.9, 0.1], [0.9, 0.1], [0.5, 0.5]])
    plan = plan_dispatch(wanted, num_experts=6, capacity=torch.tensor(1), reroute=2)
    assert plan.kept.tolist() == [[True, True], [True, False], [False, False]]
    assert plan.weights.tolist() == [pytest.approx([0.9, 0.1]), [1.0, 0.0], [0.5, 0.5]]
    assert plan.order.tolist() == [1, 0, 2, 4, 5, 3]
    assert plan.ends.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_balance_loss_is_one_at_perfect_balance() -> None:
    assert balance_loss(torch.full((12, 4), 0.25), torch.tensor([6, 6, 6, 6]), top_k=2).item() == pytest.approx(1.0)


def test_the_balance_loss_is_the_number_worked_out_by_hand() -> None:
    # E 2, k 1, T 4: counts 3 and 1, probabilities sum to 2.8 and 1.2: 2 / 16 x (8.4 + 1.2)
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    assert balance_loss(probabilities, torch.tensor([3, 1]), top_k=1).item() == pytest.approx(1.2)


def test_everything_at_one_expert_costs_the_number_of_experts_over_k() -> None:
    probabilities = torch.zeros(10, 4)
    probabilities[:, 0] = 1.0
    assert balance_loss(probabilities, torch.tensor([10, 0, 0, 0]), top_k=1).item() == pytest.approx(4.0)


def test_the_z_loss_is_the_mean_squared_logsumexp() -> None:
    logits = torch.log(torch.tensor([[1.0, 1.0, 2.0], [3.0, 4.0, 1.0]]))  # sums 4 and 8
    assert z_loss(logits).item() == pytest.approx((math.log(4) ** 2 + math.log(8) ** 2) / 2)
