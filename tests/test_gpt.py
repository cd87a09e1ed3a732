from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from apt_model.gpt import GPT, Output
from apt_model.ignored import IGNORED
from apt_model.layers import scheduled
from apt_model.layers.counted import Counted
from apt_model.layers.moe import MoE
from apt_model.layers.tally import METRICS, routing_metrics
from apt_model.schedule.targets import matching


def model(**options) -> GPT:
    torch.manual_seed(0)
    moe = {"num_experts": 4, "top_k": 2} | options.pop("moe", {})
    sizes = {"vocab_size": 50, "d_model": 16, "num_heads": 2, "num_layers": 3, "d_ff": 24, "seq_len": 20}
    return GPT(**(sizes | options), moe=partial(MoE, **moe))


def put(gpt: GPT, pattern: str, value: float) -> None:
    setters = scheduled.setters(gpt)
    for name in matching(pattern, setters):
        setters[name](value)


def test_the_number_of_parameters_is_that_worked_out_by_hand() -> None:
    layer = 2 * 16 + 4 * 16 * 16 + 3 * 16 * 24  # norms, attention, SwiGLU
    dense = 50 * 16 + 3 * layer + 16
    gpt = model()
    assert sum(p.numel() for p in gpt.parameters()) == dense
    gpt.enable_moe(True)
    assert sum(p.numel() for p in gpt.parameters()) == dense + 3 * (3 * 3 * 16 * 24 + 4 * 16)


def test_features_add_the_parameters_worked_out_by_hand() -> None:
    def count(gpt: GPT) -> int:
        return sum(p.numel() for p in gpt.parameters())

    plain = count(model())
    assert count(model(tie_embeddings=False)) == plain + 50 * 16
    assert count(model(num_kv_heads=1)) == plain - 3 * 2 * 16 * 8  # keys and values of one of two heads, 8 wide
    assert count(model(head_dim=4)) == plain - 3 * 4 * 16 * 8
    assert count(model(qkv_bias=True)) == plain + 3 * 48
    assert count(model(qk_norm="head")) == plain + 3 * (8 + 8)
    assert count(model(qk_norm="all", num_kv_heads=1)) == count(model(num_kv_heads=1)) + 3 * (16 + 8)


def test_an_untied_model_predicts_by_a_matrix_of_its_own() -> None:
    gpt = model(tie_embeddings=False).eval()
    tokens = torch.randint(0, 50, (2, 20))
    with torch.no_grad():
        before = gpt(tokens).logits
        gpt.unembedding.weight.mul_(2)
        assert torch.allclose(gpt(tokens).logits, 2 * before)


def test_the_loss_of_a_new_model_is_that_of_guessing() -> None:
    tokens = torch.randint(0, 50, (4, 20))
    loss = model()(tokens, torch.randint(0, 50, (4, 20))).language_loss
    assert loss.item() == pytest.approx(torch.log(torch.tensor(50.0)).item(), abs=0.1)


def test_no_prediction_depends_on_later_tokens_with_every_module_on() -> None:
    gpt = model(moe={"capacity_factor": None}).eval()
    for switch in gpt.switches().values():
        switch(True)
    gpt.voter.dropout = 0.0
    with torch.no_grad():
        gpt.align.back.weight.normal_()
        tokens = torch.randint(0, 50, (2, 20))
        changed = tokens.clone()
        changed[:, 13:] = (changed[:, 13:] + 1) % 50
        assert torch.allclose(gpt(tokens).logits[:, :13], gpt(changed).logits[:, :13], atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
@pytest.mark.parametrize("capacity", [1.1, 1.5])
@pytest.mark.parametrize("granularity", [1, 2, 3])
@pytest.mark.parametrize("shared_expert", [False, True])
def test_logits_agree_before_and_after_experts_are_enabled(
    temperature: float, capacity: float, granularity: int, shared_expert: bool
) -> None:
    slices = {"num_experts": 4 * granularity, "top_k": 2 * granularity, "granularity": granularity}
    gpt = model(moe=slices | {"shared_expert": shared_expert})  # in training, where a capacity counts
    tokens = torch.randint(0, 50, (8, 20))
    with torch.no_grad():
        before = gpt(tokens).logits
        gpt.enable_moe(True)
        put(gpt, "router.temperature", temperature)
        put(gpt, "moe.capacity_factor", capacity)
        after = gpt(tokens)
    assert after.metrics["moe/dropped_tokens"] == 0
    assert torch.allclose(before, after.logits, atol=1e-5)


@pytest.mark.parametrize(
    ("in_evaluation", "training", "same"), [(None, False, True), (0.25, False, False), (None, True, False)]
)
def test_what_becomes_of_a_sequence_in_evaluation_does_not_depend_on_its_batch(
    in_evaluation: float | None, training: bool, same: bool
) -> None:
    gpt = model(moe={"capacity_factor": 0.25, "eval_capacity_factor": in_evaluation})
    gpt.enable_moe(True)
    with torch.no_grad():
        for parameter in gpt.parameters():  # experts that differ
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        gpt.train(training)
        tokens = torch.randint(0, 50, (8, 20))
        together = gpt(tokens)
        alone = torch.cat([gpt(tokens[row : row + 1]).logits for row in range(8)])
    assert torch.allclose(together.logits, alone, atol=1e-4) == same
    assert (together.metrics["moe/drop_fraction"] == 0) == same


@pytest.mark.parametrize("chunk", [1, 32, 33, 1000])
def test_a_loss_in_chunks_is_the_whole_ones_loss_with_its_gradients(chunk: int) -> None:
    torch.manual_seed(1)
    tokens, targets = torch.randint(0, 50, (4, 20)), torch.randint(0, 50, (4, 20))
    found = []
    for loss_chunk in (None, chunk):
        gpt = model(loss_chunk=loss_chunk, label_smoothing=0.1)
        gpt.voter.enable(True)
        gpt.voter.dropout = 0.0
        with torch.no_grad():
            gpt.embedding.weight.mul_(20)  # predictions of every certainty
        gpt.voter.threshold.fill_(1.0)  # some positions vote, some do not
        output = gpt(tokens, targets)
        output.language_loss.backward()
        found.append((output, {name: p.grad for name, p in gpt.named_parameters()}))
    (whole, gradients), (chunked, others) = found
    assert 0.1 < whole.metrics["voter/voted_fraction"] < 0.9
    assert chunked.logits is None
    torch.testing.assert_close(chunked.language_loss, whole.language_loss)
    torch.testing.assert_close(chunked.metrics, whole.metrics)
    torch.testing.assert_close(others, gradients)


def test_a_loss_in_chunks_never_holds_all_logits() -> None:
    gpt = model(vocab_size=4000, loss_chunk=10)
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(t.numel() for t in (result if isinstance(result, tuple) else [result]) if torch.is_tensor(t))
            return result

    tokens = torch.randint(0, 4000, (4, 20))
    with Watch():
        gpt(tokens, tokens).language_loss.backward()
    assert 10 * 4000 in made
    assert max(made) <= 4000 * 16  # the embedding's gradient; all logits would be 80 x 4000


def test_a_value_is_written_into_every_layer_in_place() -> None:
    gpt = model()
    buffers = [layer.temperature for layer in gpt.moe_layers]
    put(gpt, "router.temperature", 0.75)
    gpt.enable_moe(True)
    assert [buffer.item() for buffer in buffers] == [0.75] * 3
    assert all(layer.temperature is buffer for layer, buffer in zip(gpt.moe_layers, buffers, strict=True))


def test_what_is_off_costs_nothing() -> None:
    gpt = model()
    output = gpt(torch.randint(0, 50, (2, 20)), torch.randint(0, 50, (2, 20)))
    assert output.metrics == {}
    assert output.auxiliary_loss.item() == 0
    assert not output.auxiliary_loss.requires_grad
    assert not any("expert" in name or "router" in name or "align" in name for name, _ in gpt.named_parameters())


def test_metrics_of_routing_are_reported_of_each_layer_only_where_they_are_asked_for() -> None:
    gpt = model(moe={"num_experts": 5})
    tokens = torch.randint(0, 50, (2, 20))
    assert gpt(tokens).routing is None, "dense layers route nothing"
    gpt.enable_moe(True)
    output, silent = gpt(tokens), gpt(tokens, with_metrics=False)
    assert silent.routing is None
    assert not any(name.startswith("moe/") for name in silent.metrics)
    assert torch.equal(silent.logits, output.logits)
    told = routing_metrics(output.routing)
    assert output.metrics == pytest.approx({name: v for name, v in told.items() if "layer" not in name})
    each = {name: [told[f"moe/layer_{layer:02}/{name}"] for layer in range(3)] for name in METRICS}
    assert set(told) == {f"{where}/{name}" for name in METRICS for where in ("moe", *LAYERS)}
    assert told["moe/max_load"] == max(each["max_load"])
    assert told["moe/dead_experts"] == sum(each["dead_experts"])
    assert told["moe/router_entropy"] == pytest.approx(sum(each["router_entropy"]) / 3)


LAYERS = ("moe/layer_00", "moe/layer_01", "moe/layer_02")


def test_activations_that_are_computed_again_are_reported_once_and_move_no_bias_twice() -> None:
    torch.manual_seed(7)  # with other tokens the second move may undo the first
    tokens, targets = torch.randint(0, 50, (2, 2, 20))
    found = []
    for again in (False, True):
        gpt = model(moe={"router": "sigmoid", "bias_update_rate": 0.05})
        gpt.enable_moe(True)
        for block in gpt.blocks if again else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for _ in range(3):
            output = gpt(tokens, targets)
            output.language_loss.backward()
        found.append((gpt, routing_metrics(output.routing)))
    (plain, told), (recomputed, told_again) = found
    assert told == told_again
    assert plain.moe_layers[0].router.bias.any()
    for one, other in zip(plain.moe_layers, recomputed.moe_layers, strict=True):
        assert torch.equal(one.router.bias, other.router.bias)
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_auxiliary_losses_are_the_layers_mean_and_the_alignment() -> None:
    gpt = model(moe={"balance_loss_weight": 1.0, "z_loss_weight": 0.0})
    gpt.enable_moe(True)
    gpt.align.enable(True)
    put(gpt, "align.weight", 2.0)
    output = gpt(torch.randint(0, 50, (2, 20)))
    expected = output.metrics["moe/balance_loss"] + 2.0 * output.metrics["align/loss"]
    assert torch.allclose(output.auxiliary_loss, expected)


@pytest.mark.parametrize("loss_chunk", [None, 7])
def test_the_z_loss_is_the_mean_squared_logsumexp_in_training_alone(loss_chunk: int | None) -> None:
    gpt, plain = model(loss_chunk=loss_chunk, z_loss_weight=0.5), model()
    tokens, targets = torch.randint(0, 50, (2, 2, 20))
    targets[1, 5:] = IGNORED
    output, reference = gpt(tokens, targets), plain(tokens, targets)
    z = reference.logits.logsumexp(dim=-1).square()[targets != IGNORED].mean()
    assert output.metrics["head/z_loss"].item() == pytest.approx(z.item(), rel=1e-5)
    assert output.auxiliary_loss.item() == pytest.approx(0.5 * z.item(), rel=1e-5)
    assert output.language_loss.item() == pytest.approx(reference.language_loss.item(), rel=1e-6)
    (output.language_loss + output.auxiliary_loss).backward()
    (reference.language_loss + 0.5 * z).backward()
    for one, other in zip(gpt.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)
    assert gpt.eval()(tokens, targets).auxiliary_loss == 0.0


@pytest.mark.parametrize("loss_chunk", [None, 7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padding_is_part_of_no_loss_and_no_metric(loss_chunk: int | None, smoothing: float) -> None:
    gpt = model(moe={"capacity_factor": None, "router": "sigmoid"}, loss_chunk=loss_chunk, label_smoothing=smoothing)
    for switch in gpt.switches().values():
        switch(True)
    gpt.voter.dropout = 0.0
    put(gpt, "voter.threshold", 3.9)
    for layer in gpt.moe_layers:
        torch.nn.init.normal_(layer.router.weight)
    tokens, targets = torch.randint(0, 50, (2, 3, 20))
    padded = targets.clone()
    padded[:, 12:] = IGNORED  # every sequence after its 12th position
    padded[2] = IGNORED  # a sequence of padding alone
    short, long = gpt(tokens[:2, :12], targets[:2, :12]), gpt(tokens, padded)
    assert long.language_loss.item() == pytest.approx(short.language_loss.item(), rel=1e-5)
    assert long.auxiliary_loss.item() == pytest.approx(short.auxiliary_loss.item(), rel=1e-5)
    assert long.metrics.keys() == short.metrics.keys() >= {"align/loss", "align/agreement", "voter/voted_fraction"}
    for name, value in short.metrics.items():
        assert long.metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert torch.allclose(long.routing, short.routing, rtol=1e-4, atol=1e-3)
    assert all(torch.isfinite(p.grad).all() for p in gradients(gpt, long))
    nothing = gpt(tokens, torch.full_like(targets, IGNORED))
    assert nothing.language_loss.item() == nothing.auxiliary_loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in gradients(gpt, nothing))


def gradients(gpt: GPT, output: Output) -> list[torch.nn.Parameter]:
    gpt.zero_grad()
    (output.language_loss + output.auxiliary_loss).backward()
    return [p for p in gpt.parameters() if p.grad is not None]


def test_a_mask_under_which_all_positions_count_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, targets = torch.randint(0, 50, (2, 2, 20))
    found = []
    for mask in (None, Counted.of(torch.ones(2, 20, dtype=torch.bool))):  # the second, as on a GPU
        gpt = model(label_smoothing=0.1)
        for switch in gpt.switches().values():
            switch(True)
        monkeypatch.setattr("apt_model.gpt.counted_positions", lambda targets, mask=mask: mask)
        torch.manual_seed(1)
        found.append(gpt(tokens, targets))
    one, other = found
    assert torch.equal(one.language_loss, other.language_loss)
    assert torch.equal(one.auxiliary_loss, other.auxiliary_loss)
    assert torch.equal(one.routing, other.routing)
    assert one.metrics == other.metrics


@pytest.mark.parametrize("ffn", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_implementation_trains_with_every_module_on(ffn: str, attention: str) -> None:
    gpt = model(ffn=ffn, attention=attention)
    for switch in gpt.switches().values():
        switch(True)
    output = gpt(torch.randint(0, 50, (2, 20)), torch.randint(0, 50, (2, 20)))
    (output.language_loss + output.auxiliary_loss).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in gpt.parameters())
