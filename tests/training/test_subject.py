"""Any module is a model: what it may return, how it is called, what it may offer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apt_model.errors import ConfigError
from apt_model.generation import Sampling, generate
from apt_model.gpt import Output
from apt_model.training import subject
from apt_model.training.checkpoint import Checkpoints, load
from apt_model.training.subject import Forward, Rereader

VOCABULARY = 11


class Plain(nn.Module):
    """Gives logits of the next token for each."""

    def __init__(self, give=lambda logits, loss: logits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.head = nn.Linear(4, VOCABULARY)
        self.give = give

    def logits(self, tokens):
        return self.head(self.embedding(tokens))

    def forward(self, tokens):
        return self.logits(tokens)


class WithTargets(Plain):
    def forward(self, tokens, targets):
        logits = self.logits(tokens)
        return self.give(logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


class OfLibrary(Plain):
    def forward(self, input_ids, labels=None, use_cache=True):
        assert labels is None
        assert not use_cache
        return SimpleNamespace(logits=self.logits(input_ids), loss=None)


TOKENS, TARGETS = torch.arange(20).view(2, 2, 5) % VOCABULARY

MODELS = {
    "logits": Plain(),
    "a loss": WithTargets(lambda logits, loss: loss),
    "a pair": WithTargets(lambda logits, loss: (logits, loss)),
    "a mapping": WithTargets(lambda logits, loss: {"loss": loss, "logits": logits}),
    "an object": WithTargets(lambda logits, loss: SimpleNamespace(loss=loss, logits=logits)),
    "an output": WithTargets(lambda logits, loss: Output(logits, loss, torch.zeros(()), {})),
    "a model of transformers": OfLibrary(),
}


@pytest.mark.parametrize("name", MODELS)
def test_whatever_a_model_returns_is_an_output(name: str) -> None:
    model = MODELS[name]
    expected = F.cross_entropy(model.logits(TOKENS).flatten(0, 1), TARGETS.flatten())
    output = Forward(model)(model, TOKENS, TARGETS)
    assert torch.allclose(output.language_loss, expected)
    assert (output.logits is None) == (name == "a loss")
    assert output.auxiliary_loss == 0


@pytest.mark.parametrize("wrong", [None, "text", torch.zeros(3), (torch.zeros(3), None)])
def test_what_is_no_loss_is_told(wrong: object) -> None:
    model = WithTargets(lambda logits, loss: wrong)
    with pytest.raises(ConfigError, match=r"model: WithTargets returned something of the type|a tensor of the shape"):
        Forward(model)(model, TOKENS, TARGETS)


def test_a_loss_of_ones_own_takes_logits_targets_and_hidden_states_where_it_wants_them() -> None:
    def half(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / 2

    def of_hidden(logits, targets, hidden):
        return hidden.sum()

    model = Plain()
    whole = Forward(model)(model, TOKENS, TARGETS).language_loss
    assert torch.allclose(Forward(model, half)(model, TOKENS, TARGETS).language_loss, whole / 2)
    with pytest.raises(ConfigError, match="it takes hidden states, and Plain gives none"):
        Forward(model, of_hidden)(model, TOKENS, TARGETS)
    shown = WithTargets(lambda logits, loss: {"logits": logits, "hidden": torch.ones(2, 3)})
    assert Forward(shown, of_hidden)(shown, TOKENS, TARGETS).language_loss == 6
    only = MODELS["a loss"]
    with pytest.raises(ConfigError, match="loss: it is made of logits"):
        Forward(only, half)(only, TOKENS, TARGETS)


def test_blocks_are_what_a_model_says_or_its_longest_list() -> None:
    class Said(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(1, 1), nn.Linear(1, 1)

        def blocks(self):
            return [self.two]

    said = Said()
    assert subject.blocks(said) == [said.two]
    found = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)]), nn.ModuleList([nn.ReLU(), nn.ReLU()]))
    assert subject.blocks(found) == list(found[1])
    assert subject.blocks(nn.Linear(1, 1)) == []


def test_any_model_can_be_frozen_by_pattern() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freeze = subject.freezer(model)
    freeze("0", True)
    freeze("1.bias", True)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, False]
    freeze("*", False)
    assert all(p.requires_grad for p in model.parameters())


def test_text_is_made_without_a_cache() -> None:
    model = Plain()
    made = generate(Rereader(model, 4), [[1], [2, 3]], max_new_tokens=6, sampling=Sampling(0.0)).tokens
    follows = model.logits(torch.arange(VOCABULARY)).argmax(-1).tolist()  # one token decides on the next

    def text(token: int) -> list[int]:
        found = []
        for _ in range(6):
            token = follows[token]
            found.append(token)
        return found

    assert made == [text(1), text(3)]
    only = MODELS["a loss"]
    with pytest.raises(ConfigError, match="WithTargets gives no logits"):
        generate(Rereader(only, 4), [[1]], max_new_tokens=1, sampling=Sampling(0.0))


def test_weights_that_share_memory_are_kept_under_both_names(tmp_path) -> None:
    model = Plain()
    model.head = nn.Linear(4, VOCABULARY, bias=False)
    model.head.weight = model.embedding.weight
    path = Checkpoints(tmp_path).save({"model": model.state_dict()}, step=1)
    again = Plain()
    again.head = nn.Linear(4, VOCABULARY, bias=False)
    again.head.weight = again.embedding.weight
    again.load_state_dict(load(path)["model"])
    assert torch.equal(again.head.weight, model.embedding.weight)
