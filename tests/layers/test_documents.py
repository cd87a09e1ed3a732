"""Documents of a sequence compute what they would alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from apt_model.gpt import GPT
from apt_model.layers import documents as room
from apt_model.layers.align import BiStateAlignment
from apt_model.layers.documents import Documents
from apt_model.layers.moe import MoE

LENGTHS = [[24], [1, 7, 12, 4], [9, 9, 6], [24]]
NUMBERS = torch.stack([torch.arange(len(one)).repeat_interleave(torch.tensor(one)) for one in LENGTHS])
TOKENS = torch.randint(0, 20, (4, 24), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.randn(4, 24, 20, generator=torch.Generator().manual_seed(2))


def model(**options: Any) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "d_model": 16, "num_heads": 4, "num_layers": 2, "d_ff": 16, "seq_len": 24}
    moe = partial(MoE, num_experts=4, top_k=2, capacity_factor=None, upcycling="noise")
    return GPT(**(sizes | options), moe=moe, align=partial(BiStateAlignment, rank=4)).eval()


def alone(gpt: GPT) -> Tensor:
    """Return logits of each document as a sequence of its own, put together."""
    rows = [
        torch.cat([gpt(piece).logits for piece in torch.split(row.unsqueeze(0), lengths, dim=1)], dim=1)
        for row, lengths in zip(TOKENS, LENGTHS, strict=True)
    ]
    return torch.cat(rows)


def gradients(gpt: GPT, logits: Tensor) -> dict[str, Tensor]:
    gpt.zero_grad()
    (logits * WEIGHTS).sum().backward()
    return {name: parameter.grad for name, parameter in gpt.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("masks", [False, True], ids=["in groups", "by masks"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2},
        {"sliding_window": 5},
        {"sliding_window": 5, "num_kv_heads": 1, "qk_norm": "all"},
        {"attention": "eager"},
    ],
    ids=str,
)
def test_logits_and_gradients_are_those_of_each_document_alone(
    options: dict[str, Any], masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt = model(**options)
    gpt.enable_moe(True)
    gpt.align.enable(True)
    torch.nn.init.normal_(gpt.align.back.weight)
    wanted = alone(gpt)
    wanted_gradients = gradients(gpt, wanted)
    if masks:  # as on other devices
        monkeypatch.setattr(room, "eager_on_cpu", lambda x: False)
    found = gpt(TOKENS, documents=NUMBERS).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(gpt(TOKENS).logits, wanted, atol=1e-2)
    for name, gradient in gradients(gpt, found).items():
        assert torch.allclose(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-5), name


def test_blocks_that_are_computed_again_give_the_same() -> None:
    gpt = model()
    wanted = gradients(gpt, gpt(TOKENS, documents=NUMBERS).logits)
    gpt.activation_checkpointing = True
    again = gradients(gpt, gpt(TOKENS, documents=NUMBERS).logits)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_a_batch_in_which_each_sequence_is_one_document_computes_what_it_did() -> None:
    gpt = model()
    assert torch.equal(gpt(TOKENS, documents=torch.zeros_like(TOKENS)).logits, gpt(TOKENS).logits)


def test_documents_are_grouped_by_length_with_few_places_behind_their_ends() -> None:
    lengths = [[24], [17, 5, 2], [3, 21]]
    documents = Documents(torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in lengths]))
    assert documents.positions[1].tolist() == [*range(17), *range(5), *range(2)]
    layout = documents.layout
    assert layout is not None
    # up to 31 tokens come in multiples of 4; 17 and 21 of them take 20 and 24
    assert [tuple(group) for group in layout.groups] == [(2, 4), (1, 8), (1, 20), (2, 24)]
    assert documents.padding == pytest.approx((2 * 4 + 8 + 20 + 2 * 24 - 72) / 72)
    flat = torch.arange(72)
    assert torch.equal(flat[layout.taken][layout.back], flat)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_the_kernel_for_any_lengths_does_what_masks_do(window: int | None) -> None:
    if room.varlen() is None:
        pytest.skip("this torch has no such kernel")
    gpt = model(num_kv_heads=2, d_model=64, sliding_window=window).to("cuda", torch.bfloat16)
    tokens, numbers = TOKENS.cuda(), NUMBERS.cuda()
    found = gpt(tokens, documents=numbers).logits
    assert torch.allclose(found.float().cpu(), alone(gpt.float().cpu()), atol=0.05)
