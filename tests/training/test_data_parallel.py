"""Several processes train one model: as one process would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL

RANK = """
import json, sys
from pathlib import Path
import torch
from apt_launch.build import build_trainer
from apt_launch.config import composed
from apt_model.errors import Interrupted
from apt_model.training.checkpoint import Checkpoints
from apt_model.training.distributed import process_group

out, stop, resume, overrides = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], sys.argv[4:]
with process_group() as ranks:
    rows = []
    trainer = build_trainer(
        composed(overrides), log=rows.append, checkpoints=Checkpoints(out / "checkpoints", keep_last=9, about={}),
        resume=Path(resume) if resume else None,
        stop_requested=lambda: stop == [ranks.rank, trainer.clock.step],
    )
    try:
        trainer.fit()
    except Interrupted:
        pass
    (out / f"rows.{ranks.rank}").write_text(json.dumps(rows))
    torch.save(trainer.model.state_dict(), out / f"model.{ranks.rank}")
"""

PLAIN = ("trainer.batch_size=8", "moe.capacity_factor=null", "schedule.moe_capacity=null", "moe.balance_loss_weight=0")
"""Overrides under which the mean of shares is the whole, but for rounding."""


def train(world: int, out: Path, *overrides: str, stop: Any = None, resume: str = "") -> list[dict[str, float]]:
    """Train on ``world`` ranks; return the rows of the first."""
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        own = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", RANK, str(out), json.dumps(stop), resume, *SMALL, *overrides]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)
    rows: list[dict[str, float]] = json.loads((out / "rows.0").read_text())
    return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in rows]


def test_four_ranks_train_as_one_process_does(text_file: Path, tmp_path: Path) -> None:
    given = ("data=text", f"data.path={text_file}", *PLAIN, "schedule=none", "trainer.log_every=1")
    alone = train(1, tmp_path / "alone", *given)
    shared = train(4, tmp_path / "shared", *given)
    assert [row["tokens"] for row in shared] == [row["tokens"] for row in alone]
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        one, four = ([row[name] for row in rows if name in row] for rows in (alone, shared))
        assert four == pytest.approx(one, rel=2e-4)
    one, four = (torch.load(tmp_path / name / "model.0", weights_only=True) for name in ("alone", "shared"))
    for name in one:
        assert torch.allclose(one[name], four[name], atol=2e-3), name


def test_ranks_have_equal_weights_after_the_whole_curriculum(text_file: Path, tmp_path: Path) -> None:
    rows = train(
        2, tmp_path / "out", "data=text", f"data.path={text_file}", "moe.router=sigmoid", "moe.bias_update_rate=0.01"
    )
    assert rows[-1]["schedule/moe_enabled"] == rows[-1]["schedule/voter_enabled"] == 1
    first, second = (torch.load(tmp_path / "out" / f"model.{rank}", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(list((tmp_path / "out" / "checkpoints").glob("step-*"))) == 6


def test_all_ranks_stop_where_one_is_asked_to_and_go_on_exactly(text_file: Path, tmp_path: Path) -> None:
    given = ("data=text", f"data.path={text_file}", "trainer.log_every=1")
    whole = train(2, tmp_path / "whole", *given)
    begun = train(2, tmp_path / "begun", *given, stop=[1, 14])
    checkpoint = tmp_path / "begun" / "checkpoints" / "step-00000014"
    assert checkpoint.is_dir()
    rest = train(2, tmp_path / "rest", *given, resume=str(checkpoint))
    assert begun + rest == whole


def test_a_batch_that_cannot_be_shared_is_refused(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"trainer\.batch_size = 2 cannot be shared by 3 ranks"):
        train(3, tmp_path / "out", "data=text", f"data.path={text_file}")
