"""Tokens that mark documents, and what a batch of packed documents is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apt_model.data import Sampler
from apt_model.data.batches import Batches
from apt_model.data.borders import Borders
from apt_model.data.own import OwnCorpus
from apt_model.data.tokens import Tokens
from apt_model.errors import ConfigError
from apt_model.training.subject import Forward


def test_a_document_goes_to_its_end_and_its_last_token_has_no_target() -> None:
    window = torch.tensor([[5, 0, 6, 7, 0, 0, 8], [1, 5, 1, 6, 7, 1, 9]])
    ends, both = Borders(0), Borders(0, begin=1)
    assert ends.numbers(window).tolist() == [[0, 0, 1, 1, 1, 2, 3], [0] * 7]
    assert both.numbers(window)[1].tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert ends.targets(window).tolist() == [[0, -100, 7, 0, -100, -100], [5, 1, 6, 7, 1, 9]]
    assert both.targets(window)[1].tolist() == [5, -100, 6, 7, -100, 9]


def test_batches_have_no_target_where_another_document_begins() -> None:
    tokens = Tokens([np.array([3, 4, 0, 5, 6, 0, 7, 8, 9], dtype=np.uint8)])
    sampler = Sampler(num_tokens=9, seq_len=4, batch_size=2, seed=0)
    (given, targets), (_, all_targets) = (
        next(Batches(tokens, sampler, borders).epoch(0)) for borders in (Borders(0), None)
    )
    order = given[:, 0].argsort()
    assert targets[order].tolist() == [[4, 0, -100, 6], [0, -100, 8, 9]]
    assert all_targets[order].tolist() == [[4, 0, 5, 6], [0, 7, 8, 9]]


class Waves:
    def read(self, split: str) -> list[int]:
        return [1, 2, 3]


class Ended(Waves):
    document_end = 3


class OfSplit:
    document_begin = 2

    def __init__(self, split: str) -> None:
        pass


def test_data_of_ones_own_says_what_marks_documents() -> None:
    assert OwnCorpus(Waves, "Waves").borders is None
    assert OwnCorpus(Ended, "Ended", "document").borders == Borders(3)
    assert OwnCorpus(OfSplit, "OfSplit", "document").borders == Borders(None, 2)
    with pytest.raises(ConfigError, match=r"^data\.pack: nobody knows where documents end in the tokens of Waves\."):
        _ = OwnCorpus(Waves, "Waves", "document").borders


class Sums(torch.nn.Module):
    """Its logits of a position are the number of its document."""

    def forward(self, tokens: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        return documents.unsqueeze(2).float().expand(-1, -1, 3)


def test_a_model_of_ones_own_is_given_documents_or_refused() -> None:
    tokens = torch.tensor([[1, 0, 2, 2]])
    output = Forward(Sums(), borders=Borders(0))(Sums(), tokens, torch.zeros_like(tokens))
    assert output.logits is not None
    assert output.logits[0, :, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(ConfigError, match=r"^data\.pack: Linear takes no documents, .*or set data\.pack=null"):
        Forward(torch.nn.Linear(2, 2), borders=Borders(0))
