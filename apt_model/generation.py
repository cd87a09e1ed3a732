"""Text from a model: continues a batch of prompts, token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apt_model.errors import ConfigError


class Read(Protocol):
    """What a model remembers of tokens."""

    @property
    def length(self) -> int:
        """Tokens read."""


class Reads(Protocol):
    """A model that reads tokens and says what may come next, such as :class:`apt_model.gpt.GPT`."""

    seq_len: int
    training: bool

    def new_cache(self) -> Any:
        """Return a :class:`Read` that remembers nothing."""

    def next_logits(self, tokens: Tensor, cache: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits (batch, vocab_size) of what comes after ``tokens``, and metrics; see :meth:`GPT.next_logits`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the weights."""

    def train(self, mode: bool = True) -> Any:
        """Put it into training, or not."""

    def eval(self) -> Any:
        """Put it into evaluation."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: divides the logits; 0: always the likeliest.
        top_k: only so many of the likeliest tokens; None: all.
        top_p: only the likeliest tokens whose probabilities reach this sum (nucleus sampling, arXiv:1904.09751).

    Raises:
        ConfigError: a value out of its range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature = {self.temperature} must be 0 or positive.")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top-k = {self.top_k} must be 1 or more.")
        if not 0 < self.top_p <= 1:
            problems.append(f"top-p = {self.top_p} must be above 0 and at most 1.")
        if problems:
            raise ConfigError(*problems)

    def draw(self, logits: Tensor) -> Tensor:
        """Return a token for each row of ``logits`` (batch, vocab_size): (batch,) int64."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        return torch.multinomial(self.probabilities(logits), 1).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return those that tokens are drawn with, the shape of ``logits`` (batch, vocab_size); ``temperature`` > 0."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
        probabilities = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
            reached = ordered.cumsum(dim=-1) - ordered >= self.top_p  # without it
            probabilities = probabilities.masked_fill(reached.gather(-1, tokens.argsort(dim=-1)), 0.0)
        return probabilities / probabilities.sum(dim=-1, keepdim=True)


@dataclass
class Generated:
    """Tokens that were added to each prompt, and how long it took."""

    tokens: list[list[int]]
    voted_fraction: float = 0.0  # of the tokens drawn: those that the voter decided on
    prompt_tokens: int = 0  # read at once, of all prompts
    prompt_seconds: float = 0.0  # for these
    seconds: float = 0.0  # after them

    @property
    def tokens_per_second(self) -> float:
        """Of all prompts together, after they were read."""
        return sum(map(len, self.tokens)) / self.seconds if self.seconds else 0.0


@torch.inference_mode()
def generate(
    model: Reads,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    num_tokens: int | None = None,
    end: int | None = None,
    on_token: Callable[[int, int], None] = lambda prompt, token: None,
) -> Generated:
    """Continue each of ``prompts``, all in one batch, with a cache of keys and values.

    Prompts of different lengths are read together up to the shortest's end; while one is still being read, others are
    continued already. Where the text outgrows the model's ``seq_len``, the older half is forgotten. Experts have no capacity in
    evaluation, unless the model was given one: what becomes of a token does not depend on others of its batch.
    Draws come from torch's default generator.

    Args:
        prompts: tokens, one or more each.
        num_tokens: only the first so many of the vocabulary are drawn; None: all.
        end: the token after which a text is over; it is left out.
        on_token: called with the number of a prompt and the token added to it.

    Raises:
        ConfigError: there is no prompt, or an empty one.
    """
    if not prompts or not all(prompts):
        raise ConfigError("prompt: there has to be one, of one token at least.")
    texts = [list(prompt) for prompt in prompts]
    result = Generated([[] for _ in prompts])
    device = next(model.parameters()).device
    voted = []
    going_on = [max_new_tokens > 0] * len(prompts)
    cache = model.new_cache()
    shortest = min(map(len, texts))
    length = shortest  # tokens read of every text
    unread = [text[max(0, shortest - model.seq_len) : shortest] for text in texts]
    began = time.perf_counter()
    with _reading(model):
        while any(going_on):
            if cache.length + len(unread[0]) > model.seq_len:  # begin again with the younger half
                cache = model.new_cache()
                keep = max(1, model.seq_len // 2)
                unread = [text[length - keep : length] for text in texts]
            logits, votes = model.next_logits(torch.tensor(unread, device=device), cache)
            drawn = sampling.draw(logits[:, :num_tokens]).tolist()
            if length == shortest:
                result.prompt_tokens = len(texts) * shortest
                result.prompt_seconds = time.perf_counter() - began
                began = time.perf_counter()
            voted.append(votes["voter/voted_fraction"].item() if "voter/voted_fraction" in votes else 0.0)
            for number, token in enumerate(drawn):
                if length < len(prompts[number]):
                    continue  # still being read: the prompt says what comes next
                if going_on[number] and token != end:
                    result.tokens[number].append(token)
                    on_token(number, token)
                going_on[number] &= token != end and len(result.tokens[number]) < max_new_tokens
                texts[number].append(token)
            length += 1
            unread = [[text[length - 1]] for text in texts]
    result.seconds = time.perf_counter() - began
    result.voted_fraction = sum(voted) / len(voted) if voted else 0.0
    return result


@contextmanager
def _reading(model: Reads) -> Iterator[None]:
    """Put ``model`` into evaluation."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
