"""Several processes in the loops of other libraries: they share batches, and agree."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_launch.allow import VARIABLE
from apt_launch.config.load import composed
from apt_launch.runs.build import build_trainer
from apt_model.errors import ConfigError, Interrupted
from apt_model.schedule import Horizon, ScheduleRunner
from apt_model.training.checkpoint import Checkpoints
from apt_model.training.distributed import process_group
from tests.conftest import SMALL
from tests.integrations.ranks import Ranks, ranks
from tests.late import Late
from tests.training.test_own_model import LAB, OWN

HERE = __name__
in_lightning = Late("tests.integrations.of_lightning")
in_transformers = Late("tests.integrations.of_transformers")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    place = tmp_path_factory.mktemp("own")
    (place / "model_lab.py").write_text(LAB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(place))
        patch.setenv(VARIABLE, "model_lab")
        with ranks() as group:
            yield group


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i} of some text, {i * i} squared\n" for i in range(200)), encoding="utf-8")
    return "data=text", f"data.path={path}"


# --- a run of this project ------------------------------------------------------------------------------------------

RUN = (
    "trainer.batch_size=4",
    "trainer.accumulate=2",
    "trainer.max_batches_per_epoch=5",
    "trainer.log_every=1",
    "moe.balance_scope=global",
)


def run(
    out: Path, overrides: list[str], stop: int | None = None, resume: str | None = None, asked: int = 0
) -> dict[str, Any]:
    """Train a profile as one of the ranks; that of number ``asked`` is asked to stop at update ``stop``."""
    rows: list[dict[str, float]] = []
    with process_group() as group:
        trainer = build_trainer(
            composed(overrides),
            log=rows.append,
            checkpoints=Checkpoints(out / "checkpoints", keep_last=9),
            resume=Path(resume) if resume else None,
            stop_requested=lambda: group.rank == asked and trainer.clock.step == stop,
        )
        seen: list[list[int]] = []
        trainer.model.register_forward_pre_hook(
            lambda model, inputs: seen.append(inputs[0][:, 0].tolist()) if model.training else None
        )
        with suppress(Interrupted):
            trainer.fit()
        if trainer.checkpoints is not None:
            trainer.checkpoints.wait()
        sums = {name: weight.double().sum().item() for name, weight in trainer.model.state_dict().items()}
        clock = trainer.clock
    told = [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in rows]
    return {
        "rows": told,
        "weights": sums,
        "seen": seen,
        "sample": clock.sample,
        "token": clock.token,
        "step": clock.step,
    }


@pytest.fixture(scope="module")
def default(group: Ranks, text: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two ranks of ``trainer=default``, through the whole curriculum."""
    out = tmp_path_factory.mktemp("default") / "out"
    return group.call(2, out, f"{HERE}:run", overrides=[*SMALL, *text, *RUN])


@pytest.mark.parametrize("other", ["lightning", "hf"])
def test_two_processes_share_batches_and_a_resume_continues(
    other: str, default: list[dict[str, Any]], group: Ranks, text: tuple[str, str], tmp_path: Path
) -> None:
    overrides = [*SMALL, *text, *RUN]
    # asked on the second rank, in the middle of epoch 4: dense, experts and alignment are behind it, votes ahead
    first = group.call(2, tmp_path / "a", f"{HERE}:run", overrides=[*overrides, f"trainer={other}"], stop=14, asked=1)
    assert [rank["step"] for rank in first] == [14, 14]
    resume = tmp_path / "a" / "checkpoints" / "step-00000014"
    rest = group.call(2, tmp_path / "b", f"{HERE}:run", overrides=overrides, resume=str(resume))
    for rank in range(2):
        rows = first[rank]["rows"] + rest[rank]["rows"]
        assert len(rows) == len(default[rank]["rows"]) == 24  # 18 updates, 6 validations
        for mine, row in zip(default[rank]["rows"], rows, strict=True):
            assert row == pytest.approx(mine, rel=1e-5, abs=1e-6)
        assert rest[rank]["weights"] == pytest.approx(default[rank]["weights"], rel=1e-5, abs=1e-5)
        assert first[rank]["seen"] + rest[rank]["seen"] == default[rank]["seen"]
        assert [len(batch) for batch in first[rank]["seen"]] == [2] * len(first[rank]["seen"])  # of 4
        # 4 epochs x 5 batches x 4 samples, and 2 updates x 2 batches x 4 samples of the next one; 16 tokens each
        assert (first[rank]["sample"], first[rank]["token"]) == (4 * 20 + 2 * 8, 16 * 96)
    assert first[0]["seen"] != first[1]["seen"]


@pytest.fixture(scope="module")
def own(group: Ranks, text: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two ranks of ``trainer=default`` with a model of somebody's own."""
    return group.call(2, tmp_path_factory.mktemp("own_default") / "out", f"{HERE}:run", overrides=[*OWN, *text])


@pytest.mark.parametrize("other", ["lightning", "hf"])
def test_a_model_of_ones_own_is_shared_and_resumed(
    other: str, own: list[dict[str, Any]], group: Ranks, text: tuple[str, str], tmp_path: Path
) -> None:
    # in the middle of epoch 2: its own module came with epoch 1, experts with epoch 2
    overrides = [*OWN, *text]
    first = group.call(2, tmp_path / "a", f"{HERE}:run", overrides=[*overrides, f"trainer={other}"], stop=10, asked=1)
    assert [rank["step"] for rank in first] == [10, 10]
    resume = tmp_path / "a" / "checkpoints" / "step-00000010"
    rest = group.call(2, tmp_path / "b", f"{HERE}:run", overrides=overrides, resume=str(resume))
    for rank in range(2):
        rows = first[rank]["rows"] + rest[rank]["rows"]
        assert len(rows) == len(own[rank]["rows"]) == 16 + 4
        for mine, row in zip(own[rank]["rows"], rows, strict=True):
            assert row == pytest.approx(mine, rel=1e-4, abs=1e-5)
        assert rest[rank]["weights"] == pytest.approx(own[rank]["weights"], rel=1e-4, abs=1e-4)
        assert first[rank]["seen"] + rest[rank]["seen"] == own[rank]["seen"]
    assert first[0]["seen"] != first[1]["seen"]


def test_a_batch_that_ranks_cannot_share_is_refused(group: Ranks, text: tuple[str, str], tmp_path: Path) -> None:
    overrides = [*SMALL, *text, "trainer=lightning", "trainer.batch_size=3"]
    with pytest.raises(
        AssertionError, match=r"trainer\.batch_size = 3 cannot be shared by 2 ranks\. Make it a multiple of 2"
    ):
        group.call(2, tmp_path / "out", f"{HERE}:run", overrides=overrides)


# --- the curriculum in trainers of other people ---------------------------------------------------------------------

SWITCHES = {"enable_moe_at_epoch": 1, "enable_align_at_step": 5}
ANNEALS = {"route_temp": {"start": 2.0, "end": 0.5, "by": "epoch"}}
LATCH = {"events": {"x": {"enable": "align", "when": {"metric": "train/loss", "below": 2.98}}}}


def runner(**curriculum: Any) -> ScheduleRunner:
    return ScheduleRunner(horizon=Horizon(epochs=4, updates_per_epoch=3), **curriculum)


def told(model: torch.nn.Module, callback: Any, seen: list[Any]) -> dict[str, Any]:
    clock = callback.clock
    return {
        "weights": {name: weight.double().sum().item() for name, weight in model.state_dict().items()},
        "clock": [clock.epoch, clock.step, clock.sample, clock.token],
        "on": [[moe, align] for *_, moe, align in seen],
    }


def in_others_lightning(out: Path, **curriculum: Any) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    module = in_lightning.Plain()
    module.callback = in_lightning.ScheduleCallback(runner(**curriculum))
    trainer = in_lightning.trainer(module.callback, out, devices=2, strategy="ddp")
    trainer.fit(module, in_lightning.batches(10))  # 20 rows, 10 for each rank in batches of 2, 2 batches an update
    return told(module, module.callback, module.seen)


def in_others_transformers(out: Path, **curriculum: Any) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    model = in_transformers.Plain()
    model.callback = in_transformers.ScheduleCallback(runner(**curriculum))
    trainer = in_transformers.made(model, model.callback, out, save_strategy="no", ddp_find_unused_parameters=False)
    trainer.train_dataset = in_transformers.rows(20)
    try:
        trainer.train()
    except ConfigError as error:
        return {"refused": str(error)}
    return told(model, model.callback, model.seen)


def test_modules_that_come_in_somebodys_ddp_are_shared(group: Ranks, tmp_path: Path) -> None:
    one, other = group.call(2, tmp_path / "out", f"{HERE}:in_others_lightning", **SWITCHES, **ANNEALS)
    assert one["weights"] == pytest.approx(other["weights"], rel=1e-6, abs=1e-6)
    assert any("experts" in name for name in one["weights"])
    assert one["clock"] == other["clock"] == [3, 12, 4 * 20, 4 * 20 * 6]
    assert one["on"] == other["on"] == [[b >= 5, 3 * (b // 5) + b % 5 // 2 >= 5] for b in range(20)]


def test_modules_that_come_in_transformers_ddp_are_refused(group: Ranks, tmp_path: Path) -> None:
    for rank in group.call(2, tmp_path / "out", f"{HERE}:in_others_transformers", **SWITCHES, **ANNEALS):
        assert "parameters were added, removed, frozen or unfrozen at epoch 1, step 3" in rank["refused"]
        assert "Train in one process, in Lightning with strategy='ddp'" in rank["refused"]


def test_in_transformers_ddp_all_processes_count(group: Ranks, tmp_path: Path) -> None:
    one, other = group.call(2, tmp_path / "out", f"{HERE}:in_others_transformers", **ANNEALS)
    assert one["weights"] == pytest.approx(other["weights"], rel=1e-6, abs=1e-6)
    assert one["clock"] == other["clock"] == [3, 12, 4 * 20, 4 * 20 * 6]


def test_latches_of_all_processes_follow_the_first(group: Ranks, tmp_path: Path) -> None:
    one, other = group.call(2, tmp_path / "out", f"{HERE}:in_others_lightning", **LATCH)
    assert one["on"] == other["on"]
    assert [False, True] in one["on"]
    assert [False, False] in one["on"]


@pytest.mark.parametrize("other", ["lightning", "hf"])
def test_a_launch_on_several_ranks_is_accepted(other: str) -> None:
    composed([*SMALL, f"trainer={other}", "launch.tasks_per_node=2"])
