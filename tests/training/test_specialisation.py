from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from apt_launch.config.run_config import RunConfig
from apt_launch.runs.build import build_trainer
from apt_model.data.sources import Run, Sources
from apt_model.layers.feed_forward import FeedForward
from apt_model.layers.moe import MoE
from apt_model.training.specialisation import SourceLoads


def two_experts() -> MoE:
    """A layer whose first input decides the expert: 0 where it is negative, 1 where it is positive."""
    moe = MoE(FeedForward(d_model=2, d_ff=4), num_experts=2, top_k=1, capacity_factor=None)
    moe.enable(True)
    assert moe.router is not None
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    return moe


def told(signs: list[list[int]], runs: list[Run]) -> dict[str, float]:
    layers = [two_experts(), MoE(FeedForward(d_model=2, d_ff=4), num_experts=2, top_k=1)]  # the second stays dense
    tokens = torch.tensor(signs)
    begins = np.arange(len(tokens))[:, None] * tokens.shape[1]
    loads = SourceLoads(layers, Sources(runs), begins)
    for number, row in enumerate(tokens):  # a batch a row: counts add up
        with loads.counting(number, row.unsqueeze(0)):
            layers[0](torch.stack([row, row], dim=-1).unsqueeze(0).float())
    return loads.metrics()


def test_experts_that_each_serve_one_source_have_all_of_it() -> None:
    found = told([[-1, -1, -1, 1]], [Run("a", 3), Run("b", 1)])
    everything = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found == {
        "val/specialisation": pytest.approx(everything),
        "val/layer_00/specialisation": pytest.approx(everything),
        "val/source/a/specialisation": pytest.approx(-math.log(0.75)),
        "val/source/b/specialisation": pytest.approx(-math.log(0.25)),
    }


def test_experts_that_serve_all_sources_alike_have_none() -> None:
    found = told([[-1, 1, -1, 1]], [Run("a", 2), Run("b", 2)])
    assert set(found.values()) == {0.0}


def test_what_is_between_is_the_mutual_information_over_all_batches() -> None:
    """a: three tokens to expert 0, one to 1; b: one and three. I = log 2 - H(1/4)."""
    found = told([[-1, -1, -1, 1], [-1, 1, 1, 1]], [Run("a", 4), Run("b", 4)])
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert found["val/specialisation"] == pytest.approx(math.log(2) - quarter)
    assert found["val/source/a/specialisation"] == pytest.approx(found["val/source/b/specialisation"])


def test_a_source_that_validation_did_not_reach_is_not_reported() -> None:
    found = told([[-1, 1]], [Run("a", 1), Run("b", 1), Run("c", 9)])
    assert "val/source/c/specialisation" not in found
    assert "val/source/b/specialisation" in found


@pytest.mark.parametrize("folders", [("one", "two"), ("one", "one")])
def test_a_run_on_several_folders_reports_it_once_experts_are_enabled(
    composed: Callable[..., RunConfig], small: Callable[..., RunConfig], tmp_path: Path, folders: tuple[str, str]
) -> None:
    for number, (name, text) in enumerate(zip(folders * 4, ("abcdefgh", "12345678") * 4, strict=True)):
        (tmp_path / "texts" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name / f"{number}.txt").write_text(text * 40)
    config = small(f"data.path={tmp_path / 'texts'}", "data.val_fraction=0.5", "trainer.validation_batches=null")
    rows: list[dict[str, float]] = []
    trainer = build_trainer(config, log=rows.append)
    trainer.fit()
    by_epoch = {row["epoch"]: row for row in rows if "val/loss" in row}
    assert len(by_epoch) == 6
    told = {epoch for epoch, row in by_epoch.items() if "val/specialisation" in row}
    assert told == ({2, 3, 4, 5} if len(set(folders)) > 1 else set())
    if told:
        row = by_epoch[5]
        layers = [row[f"val/layer_0{layer}/specialisation"] for layer in range(2)]
        assert row["val/specialisation"] == pytest.approx(sum(layers) / 2)
        assert 0 < row["val/specialisation"] <= math.log(2)
    assert not any(layer.router._forward_hooks for layer in trainer.model.moe_layers if layer.router is not None)
