"""Several processes train one model, whole on each or in shards: as one process would."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL
from tests.forks import run_module
from tests.training.ranks import Ranks, Rows, ranks
from tests.training.test_compile import BACKEND

PLAIN = (
    "trainer.batch_size=8",
    "trainer.max_batches_per_epoch=2",
    "trainer.validation_batches=1",
    "trainer.log_every=1",
    "model.loss_chunk=24",
    "moe.capacity_factor=null",
    "schedule.moe_capacity=null",
    "moe.balance_scope=global",
    "moe.balance_loss_weight=0.1",
    "align.weight=0",
    "schedule.align_weight=null",
    "voter.dropout=0",
    "trainer.checkpoint_every_epochs=3",  # to gather what is sharded takes as long as an update
)
"""Overrides under which the mean of shares is the whole, but for rounding, from dense to experts, alignment and votes."""

FROZEN = (
    "+schedule.events.a={freeze: blocks.*.attention, at: 1ep}",
    "+schedule.events.b={unfreeze: blocks.*.attention, at: 3ep}",
)

ONCE = "trainer.max_batches_per_epoch=1"
"""One update an epoch: every switch, freeze and thaw of the curriculum, with updates before and after it."""

ENGINES = {
    "2 replicas": (2, ()),
    "4 replicas": (4, ()),
    "2 shards": (2, ("trainer.parallel=fsdp",)),
    "4 shards, experts over 2": (4, ("trainer.parallel=fsdp", "trainer.expert_parallel=2")),
    "2 shards, experts over 2": (2, ("trainer.parallel=fsdp", "trainer.expert_parallel=2")),
    "2 replicas, blocks again": (2, ("trainer.parallel=ddp", "trainer.activation_checkpointing=true")),
    "2 shards, experts over 2, blocks again": (
        2,
        ("trainer.parallel=fsdp", "trainer.expert_parallel=2", "trainer.activation_checkpointing=true"),
    ),
}
if os.environ.get("APT_EVERYWHERE"):  # twice as many ranks of what is there already: not in the gate
    ENGINES["4 shards"] = (4, ENGINES["2 shards"][1])
    ENGINES["4 shards, experts over 2, blocks again"] = (4, ENGINES["2 shards, experts over 2, blocks again"][1])


@pytest.fixture(scope="module")
def group() -> Iterator[Ranks]:
    with ranks() as group:
        yield group


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i} of some text, {i * i} squared\n" for i in range(200)), encoding="utf-8")
    return "data=text", f"data.path={path}"


def test_ranks_keep_documents_apart_as_one_process_does(group: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"  # of 8 tokens, two a sequence
    path.write_text("".join(f'{{"text": "{i:03} {i * i % 997:03}"}}\n' for i in range(400)))
    data = ("data=jsonl", f"data.train_path={path}", f"data.val_path={path}")
    packed = (*data, "data.pack=document", *PLAIN, "model.loss_chunk=null", "schedule=none", "trainer.max_epochs=1")
    rows = group.train(1, tmp_path / "alone", *packed)
    for parallel in ("ddp", "fsdp"):
        found = group.train(2, tmp_path / parallel, *packed, f"trainer.parallel={parallel}")
        for name in ("train/loss", "train/grad_norm", "val/loss"):
            one, other = ([row[name] for row in some if name in row] for some in (rows, found))
            assert other == pytest.approx(one, rel=1e-4), (parallel, name)
    plain = group.train(1, tmp_path / "plain", *packed, "data.pack=null")
    assert plain[0]["train/loss"] != pytest.approx(rows[0]["train/loss"], rel=1e-4)


@pytest.fixture(scope="module")
def alone(group: Ranks, data: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """One process, through the whole curriculum."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return out, group.train(1, out, *data, *PLAIN, *FROZEN)


@pytest.fixture(scope="module")
def alone_once(group: Ranks, data: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """One process, through the whole curriculum with one update an epoch."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return out, group.train(1, out, *data, *PLAIN, *FROZEN, ONCE)


MORE = ("moe/balance_loss", "train/auxiliary_loss", "train/max_attention_logit", "train/grad_norm/attention")


def same(found: Rows, expected: Rows) -> None:
    """Compare what does not depend on how a batch is shared."""
    for name in ("step", "tokens", "train/loss", "train/grad_norm", "val/loss", "lr", "moe/router_entropy", *MORE):
        one, other = ([row[name] for row in rows if name in row] for rows in (expected, found))
        assert other == pytest.approx(one, rel=1e-4), name


def state(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(out / "state", weights_only=True)
    return loaded


@pytest.mark.parametrize("name", ENGINES)
def test_ranks_train_as_one_process_does_through_the_curriculum(
    name: str, alone_once: tuple[Path, Rows], group: Ranks, data: tuple[str, str], tmp_path: Path
) -> None:
    world, engine = ENGINES[name]
    same(group.train(world, tmp_path / "out", *data, *PLAIN, *FROZEN, *engine, ONCE), alone_once[1])
    one, many = state(alone_once[0]), state(tmp_path / "out")
    assert one["model"].keys() == many["model"].keys()
    assert one["optimizer"].keys() == many["optimizer"].keys()
    for parameter, moments in one["optimizer"].items():
        assert torch.allclose(many["model"][parameter], one["model"][parameter], atol=1e-4), parameter
        for moment in moments:
            assert torch.allclose(many["optimizer"][parameter][moment], moments[moment], rtol=0.01, atol=1e-5), (
                parameter
            )
    held = [int((tmp_path / "out" / f"held.{rank}").read_text()) for rank in range(world)]
    total = sum(one["model"][parameter].numel() for parameter in one["optimizer"])
    assert held == [total // world if "trainer.parallel=fsdp" in engine else total] * world


@pytest.mark.parametrize(
    "engine", [(), ("trainer.parallel=fsdp",), ("trainer.parallel=fsdp", "trainer.expert_parallel=2")]
)
def test_ranks_balance_experts_by_the_same_bias(
    engine: tuple[str, ...], group: Ranks, data: tuple[str, str], tmp_path: Path
) -> None:
    balanced = ("moe.router=sigmoid", "moe.bias_update_rate=0.01", "trainer.batch_size=8", "trainer.max_epochs=3")
    rows = group.train(
        2, tmp_path / "out", *data, *balanced, "schedule=none", "schedule.enable_moe_at_epoch=1", *engine
    )
    assert rows[-1]["schedule/moe_enabled"] == 1
    first, second = (torch.load(tmp_path / "out" / f"plain.{rank}", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys() >= {"blocks.0.ffn.router.bias", "blocks.1.ffn.router.bias"}
    assert first["blocks.0.ffn.router.bias"].any()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "engine",
    [(), ("trainer.parallel=fsdp",), ("trainer.parallel=fsdp", "trainer.expert_parallel=2")],
)
def test_slices_of_experts_begin_on_ranks_as_on_one_process(
    engine: tuple[str, ...], group: Ranks, data: tuple[str, str], tmp_path: Path
) -> None:
    fine = ("moe.num_experts=8", "moe.top_k=4", "moe.granularity=2", "moe.upcycling=drop")
    given = (*data, *PLAIN, *fine, "schedule=none", "schedule.enable_moe_at_epoch=1", "trainer.max_epochs=3")
    one = group.train(1, tmp_path / "one", *given)
    many = group.train(2, tmp_path / "many", *given, *engine)
    same(many, one)
    cosines = [
        [row["moe/layer_01/expert_cosine"] for row in rows if "moe/layer_01/max_load" in row] for rows in (one, many)
    ]
    assert cosines[1] == pytest.approx(cosines[0], abs=1e-3)
    assert 0.1 < cosines[0][0] < 0.5, "half of the channels were drawn anew"


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_all_ranks_stop_where_one_is_asked_to_and_continue_exactly(
    engine: str, group: Ranks, data: tuple[str, str], tmp_path: Path
) -> None:
    given = (*data, "trainer.log_every=1", "trainer.max_batches_per_epoch=2", f"trainer.parallel={engine}")
    given += ("trainer.checkpoint_every_epochs=3",)
    whole = group.train(2, tmp_path / "whole", *given)
    begun = group.train(2, tmp_path / "begun", *given, stop=[1, 7])
    checkpoint = tmp_path / "begun" / "checkpoints" / "step-00000007"
    assert checkpoint.is_dir()
    rest = group.train(2, tmp_path / "rest", *given, resume=checkpoint)
    assert begun + rest == whole


@pytest.mark.parametrize("step", [3, 7])  # before experts are on, and after
def test_a_checkpoint_of_four_shards_continues_on_two_replicas_and_alone(
    step: int, alone: tuple[Path, Rows], group: Ranks, data: tuple[str, str], tmp_path: Path
) -> None:
    given = (*data, *PLAIN, *FROZEN)
    shards = ("trainer.parallel=fsdp", "trainer.expert_parallel=2")
    begun = group.train(4, tmp_path / "begun", *given, *shards, stop=[3, step])
    checkpoint = tmp_path / "begun" / "checkpoints" / f"step-{step:08d}"
    for world, engine in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        out = tmp_path / f"{world} {engine}"
        same(begun + group.train(world, out, *given, f"trainer.parallel={engine}", resume=checkpoint), alone[1])


def test_experts_that_go_off_again_are_folded_in_shards_too(
    group: Ranks, data: tuple[str, str], tmp_path: Path
) -> None:
    given = (*data, *PLAIN, "trainer.max_epochs=4", "schedule=none", "moe.shared_expert=true", "trainer.accumulate=2")
    given += ("trainer.qk_clip=0.01", "model.z_loss_weight=0.01")
    events = ("+schedule.events.a={enable: moe, at: 1ep}", "+schedule.events.b={disable: moe, at: 2ep}")
    rows = [
        group.train(
            world, tmp_path / f"{world} {len(engine)}", *given, *events, "trainer.max_batches_per_epoch=4", *engine
        )
        for world, engine in ((1, ()), (2, ENGINES["2 replicas"][1]), (2, ENGINES["2 shards, experts over 2"][1]))
    ]
    assert [row["schedule/moe_enabled"] for row in rows[0] if "train/loss" in row] == [0, 0, 1, 1, 0, 0, 0, 0]
    assert rows[0][0]["train/max_attention_logit"] > 0.01
    same(rows[1], rows[0])
    same(rows[2], rows[0])


def test_experts_grow_in_shards_and_their_checkpoint_continues_in_others(
    group: Ranks, data: tuple[str, str], tmp_path: Path
) -> None:
    given = (*data, *PLAIN, "trainer.max_epochs=4", "schedule=none", "schedule.enable_moe_at_epoch=1")
    given += ("+schedule.events.more={grow: moe, to: 8, at: 2ep}",)
    one = group.train(1, tmp_path / "one", *given)
    spread = ENGINES["2 shards, experts over 2"][1]
    begun = group.train(2, tmp_path / "begun", *given, *spread, stop=[1, 6])
    assert [row["schedule/moe_grown8"] for row in one if "train/loss" in row] == [0, 0, 0, 0, 1, 1, 1, 1]
    grown = tmp_path / "begun" / "checkpoints" / "step-00000006"
    rest = group.train(2, tmp_path / "rest", *given, *ENGINES["2 shards"][1], resume=grown)
    for name in ("step", "train/loss", "val/loss"):  # rounding may send a token to the other copy
        assert [row[name] for row in begun + rest if name in row] == pytest.approx(
            [row[name] for row in one if name in row], rel=2e-4
        )
    assert state(tmp_path / "rest")["optimizer"]["blocks.1.ffn.experts.up"]["exp_avg"].shape == (8, 32, 16)


def test_experts_grow_on_replicas_as_in_one_process_but_for_rounding(
    group: Ranks, data: tuple[str, str], tmp_path: Path
) -> None:
    """In float32 rounding may send a token to the other of two copies, and Adam moves each by a gradient of its own."""
    given = (*data, *PLAIN, "trainer.max_epochs=3", "schedule=none", "schedule.enable_moe_at_epoch=1")
    given += ("+schedule.events.more={grow: moe, to: 8, at: 2ep}",)
    for world in (1, 2):
        group.train(world, tmp_path / str(world), *given, dtype="float64")
    one, two = (state(tmp_path / str(world))["model"] for world in (1, 2))
    assert one["blocks.0.ffn.experts.up"].shape[0] == 8
    for name, weight in one.items():
        assert torch.allclose(two[name], weight, rtol=0, atol=1e-12), name
    replicas = [torch.load(tmp_path / "2" / f"plain.{rank}", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(replicas[0][name], replicas[1][name]) for name in replicas[0])


def test_attention_of_pretrained_models_trains_in_shards(group: Ranks, data: tuple[str, str], tmp_path: Path) -> None:
    like_qwen = ("model.num_kv_heads=1", "model.qk_norm=head", "model.tie_embeddings=false", "model.qkv_bias=true")
    given = (*data, *PLAIN, *like_qwen, "model.sliding_window=8", "schedule=none", "trainer.max_epochs=2")
    one = group.train(1, tmp_path / "one", *given)
    same(group.train(2, tmp_path / "many", *given, *ENGINES["2 shards"][1]), one)
    assert state(tmp_path / "many")["model"].keys() == state(tmp_path / "one")["model"].keys()


def test_a_rank_whose_experts_get_no_token_goes_along(group: Ranks, data: tuple[str, str], tmp_path: Path) -> None:
    given = (*data, *PLAIN, "schedule=none", "schedule.enable_moe_at_epoch=1", "trainer.max_epochs=3")
    few = (
        "moe.num_experts=2",
        "moe.top_k=1",
        "model.seq_len=2",
        "trainer.batch_size=2",
        "trainer.max_batches_per_epoch=8",
    )  # 4 tokens
    spread = ENGINES["2 shards, experts over 2"][1]
    alone, shared = (
        group.train(len(engine) or 1, tmp_path / str(len(engine)), *given, *few, *engine) for engine in ((), spread)
    )
    assert any(row["moe/dead_experts"] > 0 for row in alone if "moe/dead_experts" in row)
    same(shared, alone)


def test_what_ranks_cannot_share_is_refused(group: Ranks, data: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"trainer\.batch_size = 2 cannot be shared by 3 ranks"):
        group.train(3, tmp_path / "batch", *data)
    with pytest.raises(AssertionError, match=r"trainer\.expert_parallel = 2 does not divide 1 ranks"):
        group.train(1, tmp_path / "ranks", *data, "trainer.parallel=fsdp", "trainer.expert_parallel=2")


def test_ranks_that_would_write_to_different_folders_are_refused(data: tuple[str, str], tmp_path: Path) -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "apt_launch"]
    told = run_module(*command, *SMALL, *data, "trainer.parallel=fsdp", cwd=tmp_path)
    assert told.returncode == 1  # torch's launcher knows no other
    assert "error: hydra.run.dir: 2 ranks train one model, and want 2 folders" in told.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2 replicas", "2 shards, experts over 2"])
def test_ranks_train_compiled_as_one_process_does(
    name: str, group: Ranks, data: tuple[str, str], tmp_path: Path
) -> None:
    world, engine = ENGINES[name]
    short = (*PLAIN, "model.num_layers=1", "schedule=none", "schedule.enable_moe_at_epoch=1", "trainer.max_epochs=2")
    alone = group.train(1, tmp_path / "alone", *data, *short)
    assert any("moe/router_entropy" in row for row in alone)
    same(group.train(world, tmp_path / "out", *data, *short, *engine, "trainer.compile=true", backend=BACKEND), alone)


@pytest.mark.parametrize("parameter", ["embedding.weight", "blocks.1.ffn.experts.up"])
@pytest.mark.parametrize("name", ["2 shards", "2 shards, experts over 2"])
def test_a_gradient_that_overflows_on_one_rank_skips_the_update_on_all(
    name: str, parameter: str, group: Ranks, data: tuple[str, str], tmp_path: Path
) -> None:
    world, engine = ENGINES[name]
    short = (*PLAIN, "schedule=none", "schedule.enable_moe_at_epoch=0", "trainer.max_epochs=1", *engine)
    out = tmp_path / "out"
    group.train(world, out, *data, *short, "trainer.max_batches_per_epoch=4", overflow=[1, 2, parameter])
    of_ranks = [json.loads((out / f"rows.{rank}").read_text()) for rank in range(world)]
    for rows in of_ranks:
        assert [row["step"] for row in rows if "train/loss" in row] == [0, 1, 2], "three of four updates"
    assert of_ranks[0][-1]["val/loss"] == of_ranks[1][-1]["val/loss"]
    assert all(torch.isfinite(value).all() for value in state(out)["model"].values())
