from __future__ import annotations

import math

import pytest
import torch

from apt_model.layers.voter import EntropyVoter, entropy


def voter(**options) -> EntropyVoter:
    module = EntropyVoter(**options)
    module.enable(True)
    return module


HEAD = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def head(hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ HEAD.T


def test_entropy_is_in_nats() -> None:
    assert entropy(torch.zeros(4)).item() == pytest.approx(math.log(4))
    half = entropy(torch.log(torch.tensor([0.5, 0.25, 0.25])))
    assert half.item() == pytest.approx(1.5 * math.log(2))


def test_certain_positions_keep_their_logits_to_the_bit_and_uncertain_ones_are_voted_on() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 10, 8)
    logits = head(hidden)
    uncertainty = entropy(logits)
    threshold = uncertainty.median().item()
    voted, metrics = voter(threshold=threshold, dropout=0.5)(hidden, logits, head)
    uncertain = uncertainty > threshold
    assert torch.equal(voted[~uncertain], logits[~uncertain])
    assert not torch.isclose(voted[uncertain].softmax(-1), logits[uncertain].softmax(-1), atol=1e-4).all(-1).any()
    assert metrics["voter/voted_fraction"].item() == pytest.approx(uncertain.float().mean().item())
    assert metrics["voter/entropy"].item() == pytest.approx(uncertainty.mean().item())


def test_votes_are_combined_as_the_mean_of_their_probabilities() -> None:
    hidden = torch.randn(1, 1, 8)
    seen: list[torch.Tensor] = []

    def watched(h: torch.Tensor) -> torch.Tensor:
        seen.append(head(h))
        return seen[-1]

    voted, _ = voter(threshold=0.0, num_votes=4, dropout=0.3)(hidden, head(hidden), watched)
    assert len(seen) == 4
    assert not torch.equal(seen[0], seen[1])
    mean = torch.stack([vote[0].softmax(-1) for vote in seen]).mean(0)
    assert torch.allclose(voted[0, 0].softmax(-1), mean, atol=1e-6)


def test_without_dropout_voting_changes_no_probability() -> None:
    hidden = torch.randn(2, 3, 8)
    voted, _ = voter(threshold=0.0, dropout=0.0)(hidden, head(hidden), head)
    assert torch.allclose(voted.softmax(-1), head(hidden).softmax(-1), atol=1e-6)


def test_a_threshold_above_all_entropies_or_a_voter_that_is_off_calls_no_vote() -> None:
    hidden = torch.randn(2, 3, 8)
    logits = head(hidden)
    voted, metrics = voter(threshold=10.0)(hidden, logits, head)
    assert torch.equal(voted, logits)
    assert metrics["voter/voted_fraction"].item() == 0
    off = EntropyVoter(threshold=0.0)
    assert off(hidden, logits, head) == (logits, {})


def test_gradients_flow_through_votes() -> None:
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    voted, _ = voter(threshold=0.0)(hidden, head(hidden), head)
    voted.logsumexp(-1).sum().backward()
    voted, _ = voter(threshold=0.0)(hidden, head(hidden), head)
    hidden.grad = None
    voted[..., 0].sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("num_votes", [2, 3, 5])
def test_opposite_votes_move_to_either_side_of_the_prediction_which_is_one_of_an_odd_number(num_votes: int) -> None:
    torch.manual_seed(0)
    hidden, asked = torch.randn(2, 4, 8), []

    def watched(h: torch.Tensor) -> torch.Tensor:
        asked.append(h)
        return head(h)

    voting = voter(threshold=0.0, num_votes=num_votes, dropout=0.3, draws="opposite")
    voted, _ = voting(hidden, head(hidden), watched)
    assert len(asked) == voting.head_passes == num_votes - num_votes % 2
    for one, other in zip(asked[::2], asked[1::2], strict=True):
        dropped = one.reshape(-1, 8)
        assert ((dropped == 0) | torch.isclose(dropped, hidden.reshape(-1, 8) / 0.7)).all()
        assert torch.allclose((one + other).reshape(-1, 8), 2 * hidden.reshape(-1, 8), atol=1e-6)
    own = [head(hidden).reshape(-1, 5)] if num_votes % 2 else []
    votes = torch.stack([*own, *(head(h).reshape(-1, 5) for h in asked)])
    assert torch.allclose(votes.mean(0), head(hidden).reshape(-1, 5), atol=1e-5)  # the head is linear
    assert torch.allclose(voted.softmax(-1).reshape(-1, 5), votes.softmax(-1).mean(0), atol=1e-6)


def test_one_opposite_vote_is_the_prediction() -> None:
    hidden = torch.randn(2, 3, 8)
    voted, _ = voter(threshold=0.0, num_votes=1, draws="opposite")(hidden, head(hidden), head)
    assert torch.allclose(voted.softmax(-1), head(hidden).softmax(-1), atol=1e-6)
