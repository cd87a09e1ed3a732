"""Text from a model, token by token, against forward passes over the whole text."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from apt_model.errors import ConfigError
from apt_model.generation import Sampling, generate
from apt_model.gpt import GPT, Cache
from apt_model.layers.moe import MoE
from apt_model.layers.voter import EntropyVoter

SIZES = {"vocab_size": 31, "d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 24, "seq_len": 12}
GREEDY = Sampling(temperature=0)


def model_with(*modules: str, attention: str = "sdpa", capacity: float | None = None, threshold: float = 9.0) -> GPT:
    torch.manual_seed(0)
    model = GPT(
        **SIZES,
        attention=attention,
        moe=partial(MoE, num_experts=4, capacity_factor=capacity),
        voter=partial(EntropyVoter, threshold=threshold),
    )
    for module in modules:
        model.switches()[module](True)
    with torch.no_grad():  # modules that begin as copies or zeros come to matter
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("modules", [(), ("moe",), ("align",), ("moe", "align", "voter")])
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 4, 2]])
def test_reading_in_pieces_predicts_what_reading_at_once_does(
    attention: str, modules: tuple[str, ...], pieces: list[int]
) -> None:
    model = model_with(*modules, attention=attention)
    tokens = torch.randint(31, (3, 12))
    cache = Cache(len(model.blocks))
    done = 0
    with torch.no_grad():
        at_once = model(tokens).logits
        for piece in pieces:
            logits, _ = model.next_logits(tokens[:, done : done + piece], cache)
            done += piece
            torch.testing.assert_close(logits, at_once[:, done - 1], atol=1e-5, rtol=1e-4)
    assert cache.length == 12


def greedy_by_hand(model: GPT, text: list[int], steps: int) -> list[int]:
    for _ in range(steps):
        with torch.no_grad():
            text = [*text, int(model(torch.tensor([text])).logits[0, -1].argmax())]
    return text[-steps:]


def test_prompts_of_different_lengths_continue_as_each_would_alone() -> None:
    model = model_with("moe", "align")
    prompts = [[3, 1, 4, 1, 5, 9], [2], [7, 1, 8]]
    expected = [greedy_by_hand(model, prompt, 5) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=5, sampling=GREEDY).tokens == expected


@pytest.mark.gpu
def test_a_gpu_makes_the_text_that_the_cpu_makes() -> None:
    model = model_with("moe", "align", "voter")
    asked = {"max_new_tokens": 20, "sampling": GREEDY}  # past the window of 12
    expected = generate(model, [[3, 1, 4, 1, 5, 9], [2]], **asked).tokens
    assert generate(model.cuda(), [[3, 1, 4, 1, 5, 9], [2]], **asked).tokens == expected


def test_a_capacity_of_the_training_batches_drops_nothing_while_text_is_made() -> None:
    prompts = [[3, 1, 4], [1, 5, 9], [2, 6, 5]]
    tight, free = model_with("moe", capacity=0.25), model_with("moe", capacity=None)
    expected = generate(free, prompts, max_new_tokens=4, sampling=GREEDY).tokens
    assert generate(tight.train(), prompts, max_new_tokens=4, sampling=GREEDY).tokens == expected
    assert tight.training


def test_text_longer_than_the_window_forgets_its_older_half() -> None:
    model = model_with("align")
    text = [3, 1, 4]
    for _ in range(20):
        if len(text) <= 12:
            window = text
        else:  # 13 do not fit: the last 6, and from there on up to 12 again
            window = text[len(text) - 6 - (len(text) - 13) % 7 :]
        with torch.no_grad():
            text = [*text, int(model(torch.tensor([window])).logits[0, -1].argmax())]
    assert generate(model, [[3, 1, 4]], max_new_tokens=20, sampling=GREEDY).tokens == [text[3:]]


def test_a_prompt_longer_than_the_window_counts_with_its_end() -> None:
    model = model_with()
    prompt = [int(token) for token in torch.randint(31, (40,))]
    expected = greedy_by_hand(model, prompt[-12:], 1)
    assert generate(model, [prompt], max_new_tokens=1, sampling=GREEDY).tokens == [expected]


def test_the_token_at_the_end_is_left_out_and_others_continue() -> None:
    model = model_with()
    alone = [greedy_by_hand(model, prompt, 6) for prompt in ([3], [5])]
    end = alone[0][2]
    expected = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in alone]
    assert generate(model, [[3], [5]], max_new_tokens=6, sampling=GREEDY, end=end).tokens == expected


def test_only_tokens_that_the_corpus_has_are_drawn() -> None:
    torch.manual_seed(0)
    drawn = generate(model_with(), [[1]] * 8, max_new_tokens=10, sampling=Sampling(5.0), num_tokens=4).tokens
    assert {token for tokens in drawn for token in tokens} == {0, 1, 2, 3}


def test_votes_are_counted_where_the_voter_is_on() -> None:
    every = generate(model_with("voter", threshold=0.0), [[1], [2]], max_new_tokens=3, sampling=GREEDY)
    never = generate(model_with("voter", threshold=9.0), [[1], [2]], max_new_tokens=3, sampling=GREEDY)
    assert (every.voted_fraction, never.voted_fraction) == (1.0, 0.0)


def test_probabilities_of_the_draw_computed_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    e = math.e
    cases = {
        Sampling(1.0): [e, e**3, e**2, 1],
        Sampling(2.0): [e**0.5, e**1.5, e, 1],
        Sampling(1.0, top_k=2): [0, e**3, e**2, 0],
        Sampling(1.0, top_k=9): [e, e**3, e**2, 1],
        Sampling(1.0, top_p=0.6): [0, 1, 0, 0],  # 0.644 alone
        Sampling(1.0, top_p=0.65): [0, e**3, e**2, 0],  # 0.644 + 0.237
    }
    for sampling, weights in cases.items():
        expected = torch.tensor([[weight / sum(weights) for weight in weights]])
        torch.testing.assert_close(sampling.probabilities(logits), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "told"), [((-1.0,), "temperature"), ((1.0, 0), "top-k"), ((1.0, None, 0.0), "top-p")]
)
def test_values_out_of_range_are_refused(values: tuple[float, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Sampling(*values)


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_a_prompt_has_a_token(prompts: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        generate(model_with(), prompts, max_new_tokens=1, sampling=GREEDY)
