"""Data, losses, callbacks and loggers of one's own, in a config."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from apt_launch.allow import VARIABLE, allowing, covers
from apt_launch.config.run_config import RunConfig
from apt_launch.runs.build import build_trainer
from apt_launch.tracking.once import OnceEach
from apt_model.data.own import OwnCorpus, Rows
from apt_model.errors import CallbackError, ConfigError
from apt_model.training.callbacks import Callback, Callbacks, Named
from apt_model.training.checkpoint import Checkpoints

LAB = """
import torch
import torch.nn.functional as F
from apt_model.training.callbacks import Callback


class Numbers:
    vocab_size = 50

    def __init__(self, count: int = 600):
        self.count = count

    def read(self, split):
        return torch.arange(self.count) % (50 if split == "train" else 49)

    def check(self):
        if self.count == 601:
            raise ValueError("601 is one too many")


class Pairs(torch.utils.data.Dataset):
    def __init__(self, split: str, tokens: int = 17, rows: int = 40):
        self.rows = torch.arange(rows * tokens).view(rows, tokens) % (50 if split == "train" else 49)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number]


def halved(logits, targets, by: float = 2.0):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / by


def of_hidden(logits, targets, hidden):
    return halved(logits, targets) + 0.0 * hidden.sum()


class Counts(Callback):
    def __init__(self):
        self.steps = 0

    def on_step(self, trainer):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "data_lab.py").write_text(LAB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    with allowing(["data_lab"]):
        yield
    for name in [name for name in sys.modules if covers("data_lab", name)]:
        del sys.modules[name]


SHORT = ("schedule=none", "trainer.max_epochs=2", "model.vocab_size=50", "data=own")
NUMBERS = (*SHORT, "data._target_=data_lab.Numbers")


def trained(config: RunConfig, **options) -> tuple[list[dict[str, float]], object]:
    rows: list[dict[str, float]] = []
    trainer = build_trainer(config, log=rows.append, **options)
    trainer.fit()
    return rows, trainer


def small_of(composed: Callable[..., RunConfig], *overrides: str) -> RunConfig:
    from tests.conftest import SMALL

    return composed(*SMALL, *overrides)


# --- data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [list(range(9)), np.arange(9, dtype=np.uint16), torch.arange(9), bytes(range(9)), tuple(range(9))]
)
def test_whatever_holds_integers_is_tokens(given: object) -> None:
    class Source:
        def read(self, split: str) -> object:
            return given

    corpus = OwnCorpus(Source, "Source")
    assert corpus.count("train") == 9
    assert corpus.read("val").array().tolist() == list(range(9))
    assert corpus.vocab_size == 9
    assert corpus.read("train") is corpus.read("train")


@pytest.mark.parametrize(
    ("given", "told"),
    [([0.5], "float64 that are no tokens"), ([-1], "no tokens"), (7, "of the type int"), ([[]], "A row is a sequence")],
)
def test_what_is_no_tokens_is_told(given: object, told: str) -> None:
    class Source:
        def read(self, split: str) -> object:
            return np.asarray(given) if given == [0.5] else given

    with pytest.raises(ConfigError, match=told):
        OwnCorpus(Source, "Source").read("train")


def test_rows_are_shuffled_whole() -> None:
    rows = Rows([[10 * n + i for i in range(5)] for n in range(7)], "it gave")
    assert len(rows) == 7 * 4 + 1  # the sampler finds 7 windows of 4 tokens and one target
    assert rows.windows(np.array([8, 0]), 5).tolist() == [[20, 21, 22, 23, 24], [0, 1, 2, 3, 4]]


def test_a_class_with_read_trains_and_is_checked(lab: None, composed: Callable[..., RunConfig]) -> None:
    config = small_of(composed, *NUMBERS)
    rows, _ = trained(config)
    assert "val/loss" in rows[-1]
    assert trained(small_of(composed, *NUMBERS))[0][-1]["val/loss"] == rows[-1]["val/loss"]
    config.corpus.check()
    with pytest.raises(ConfigError, match="601 is one too many"):
        small_of(composed, *NUMBERS, "+data.count=601").corpus.check()
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 40 is less than the 50 tokens"):
        small_of(composed, *NUMBERS, "model.vocab_size=40")


def test_a_data_set_of_rows_trains_and_its_rows_have_to_fit(lab: None, composed: Callable[..., RunConfig]) -> None:
    given = [*SHORT, "data._target_=data_lab.Pairs"]
    config = small_of(composed, *given)
    assert config.horizon.updates_per_epoch == 4
    assert "val/loss" in trained(config)[0][-1]
    with pytest.raises(
        ConfigError, match=r"takes rows of 17 tokens, and those of the train split have 9. Set model.seq_len=8"
    ):
        small_of(composed, *given, "+data.tokens=9")
    with pytest.raises(ConfigError, match=r"data\.split: Pairs is given it by the launcher"):
        small_of(composed, *given, "+data.split=val")


# --- losses, callbacks ---------------------------------------------------------------------------------------------------


def test_a_loss_of_ones_own_is_what_is_minimised_and_validated(lab: None, composed: Callable[..., RunConfig]) -> None:
    whole, _ = trained(small_of(composed, *NUMBERS))
    half, _ = trained(small_of(composed, *NUMBERS, "loss=own", "loss._target_=data_lab.halved"))
    hidden, _ = trained(small_of(composed, *NUMBERS, "loss=own", "loss._target_=data_lab.of_hidden"))
    assert half[0]["train/loss"] == pytest.approx(whole[0]["train/loss"] / 2)
    assert half[-1]["val/loss"] < whole[-1]["val/loss"]
    assert [row["val/loss"] for row in hidden if "val/loss" in row] == pytest.approx(
        [row["val/loss"] for row in half if "val/loss" in row], rel=1e-5
    )


def test_at_their_defaults_loss_and_callbacks_are_no_part_of_an_identity(
    lab: None, composed: Callable[..., RunConfig]
) -> None:
    plain = small_of(composed, *NUMBERS)
    assert not any(key.startswith(("loss", "callbacks")) for key in plain.result_values)
    other = small_of(composed, *NUMBERS, "loss=own", "loss._target_=data_lab.halved", "+loss.by=3.0")
    watched = small_of(composed, *NUMBERS, "+callbacks.count._target_=data_lab.Counts")
    assert len({plain.identity, other.identity, watched.identity}) == 3


def test_a_callbacks_state_goes_into_checkpoints_and_back(
    lab: None, composed: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small_of(
        composed, *NUMBERS, "+callbacks.count._target_=data_lab.Counts", "trainer.checkpoint_every_epochs=1"
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=9)
    _, first = trained(config, checkpoints=checkpoints)
    assert first.callbacks.named["count"].steps == 8
    _, second = trained(config, resume=checkpoints.all()[0])
    assert second.callbacks.named["count"].steps == 8
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
    with pytest.raises(ConfigError, match=r"callbacks\.x\._target_: 'os\.system' may not be built"):
        small_of(composed, *NUMBERS, "+callbacks.x._target_=os.system")
    with pytest.raises(ConfigError, match="Derive it from"):
        build_trainer(small_of(composed, *NUMBERS, "+callbacks.x._target_=data_lab.Numbers"))


def test_an_average_of_the_weights_is_kept_and_goes_on_after_a_resume(
    lab: None, composed: Callable[..., RunConfig], tmp_path: Path
) -> None:
    experts = ("schedule.enable_moe_at_epoch=1", "trainer.checkpoint_every_epochs=1", "trainer.max_epochs=3")
    config = small_of(composed, *NUMBERS, *experts, "trainer.ema=0.5")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=9)
    steps: list[dict[str, torch.Tensor]] = []

    class Watch(Callback):
        def on_step(self, trainer) -> None:
            steps.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    _, first = trained(config, checkpoints=checkpoints, callbacks=[Watch()])
    expected: dict[str, torch.Tensor] = {}
    for weights in steps:
        expected = {name: (expected[name] + w) / 2 if name in expected else w for name, w in weights.items()}
    assert expected.keys() == first.average.averages.keys()
    assert "blocks.0.ffn.experts.up" in expected
    for name, value in expected.items():
        assert torch.allclose(first.average.averages[name], value, atol=1e-6), name
    _, second = trained(config, resume=checkpoints.all()[1])
    for name, value in first.average.averages.items():
        assert torch.equal(second.average.averages[name], value), name


def test_a_callback_that_cannot_take_its_state_is_named() -> None:
    class Forgets(Callback):
        def load_state_dict(self, state: dict) -> None:
            raise KeyError("steps")

    with pytest.raises(CallbackError, match="callback mine: its load_state_dict failed: KeyError"):
        Callbacks([Named("mine", Forgets())]).load_state_dict({"mine": {"a": 1}, "gone": {}})


# --- loggers -------------------------------------------------------------------------------------------------------------


def test_a_logger_is_shown_each_row_once_however_often_it_begins(tmp_path: Path) -> None:
    class Kept:
        def __init__(self) -> None:
            self.rows: list[float] = []

        def log(self, row: dict[str, float]) -> None:
            self.rows.append(row["step"])

    kept = Kept()
    for until in (2, 2, 5):  # a run that is killed twice; the record begins anew each time
        logger = OnceEach(kept, tmp_path)
        for step in range(until):
            logger.log({"step": step})
    logger.close("done")
    assert kept.rows == [0, 1, 2, 3, 4]
