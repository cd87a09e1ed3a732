"""A model of somebody else's under the whole loop: resumed, compiled into nothing, whole on each rank or in shards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from apt_launch.allow import VARIABLE, allowing
from apt_launch.config.run_config import RunConfig
from apt_launch.runs.build import build_trainer
from apt_model.errors import ConfigError
from apt_model.training.checkpoint import Checkpoints
from tests.conftest import SMALL
from tests.training.ranks import Ranks, Rows, ranks

LAB = """
import torch
import torch.nn.functional as F
from torch import nn

from apt_model.layers.feed_forward import FeedForward
from apt_model.schedule.targets import NOT_NEGATIVE


class Layer(nn.Module):
    scheduled = {"strength": NOT_NEGATIVE}

    def __init__(self, moe, width):
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.ffn = moe(FeedForward(d_model=width, d_ff=2 * width))
        self.enabled = False
        self.register_buffer("strength", torch.tensor(0.1), persistent=False)

    def forward(self, x):
        if self.enabled:
            x = x + self.strength * self.mix(x)
        return x + self.ffn(x)


class Model(nn.Module):
    def __init__(self, vocab_size: int, moe, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(moe, width) for _ in range(2))
        self.head = nn.Linear(width, vocab_size, bias=False)

    def switches(self):
        return {"gate": self.gate}

    def gate(self, on: bool) -> None:
        for layer in self.layers:
            layer.enabled = on

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""

OWN = (
    *(override for override in SMALL if not override.startswith(("model.", "trainer.max_epochs"))),
    *(
        "model=own",
        "model._target_=model_lab.Model",
        "model.vocab_size=256",
        "model.seq_len=16",
        "trainer.max_epochs=4",
    ),
    *("schedule=none", "schedule.enable_moe_at_epoch=2", "+schedule.events.gate={enable: gate, at: 1ep}"),
    *("schedule.route_temp={start: 1.5, end: 0.8, by: epoch}", "trainer.log_every=1"),
    "+schedule.anneals.strength={target: layers.*.strength, start: 0.1, end: 0.4, by: step}",
    *("moe.capacity_factor=null", "moe.balance_loss_weight=0", "moe.z_loss_weight=0"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("own")
    (place / "model_lab.py").write_text(LAB)
    (place / "text.txt").write_text("".join(f"line {i} of some text, {i * i} squared\n" for i in range(200)))
    return place


@pytest.fixture(scope="module")
def group(place: Path) -> Iterator[Ranks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(place))
        patch.setenv(VARIABLE, "model_lab")
        with ranks() as group:
            yield group


SMALLEST = (
    *(override for override in SMALL if not override.startswith("model.")),
    *("schedule=none", "moe.capacity_factor=null"),
)


def data(place: Path) -> tuple[str, str]:
    return "data=text", f"data.path={place / 'text.txt'}"


def trained(config: RunConfig, **options) -> tuple[Rows, object]:
    rows: Rows = []
    trainer = build_trainer(config, log=rows.append, **options)
    trainer.fit()
    return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in rows], trainer


def test_a_resume_goes_on_exactly_after_its_modules_were_switched(
    place: Path, composed: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(place)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=9)
    with allowing(["model_lab"]):
        config = composed(*OWN, *data(place), "trainer.checkpoint_every_epochs=1")
        rows, whole = trained(config, checkpoints=checkpoints)
        changed = {row["step"] for row in rows if row["schedule/gate_enabled"]}
        assert min(changed) == 4
        assert min(row["step"] for row in rows if row["schedule/moe_enabled"]) == 8
        assert any(name.startswith("moe/layer_01/") for row in rows for name in row)
        for path in checkpoints.all()[:3]:
            again, resumed = trained(config, resume=path)
            assert again == rows[len(rows) - len(again) :]
            for name, value in whole.model.state_dict().items():
                assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_train_it_as_one_process_would(
    group: Ranks, place: Path, tmp_path: Path, parallel: str, alone: Rows
) -> None:
    found = group.train(2, tmp_path / "out", *data(place), f"trainer.parallel={parallel}", small=OWN)
    for name in ("step", "tokens", "train/loss", "train/grad_norm", "val/loss", "moe/router_entropy"):
        one, other = ([row[name] for row in rows if name in row] for rows in (alone, found))
        assert other == pytest.approx(one, rel=1e-4), name


@pytest.fixture(scope="module")
def alone(group: Ranks, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return group.train(1, tmp_path_factory.mktemp("alone") / "out", *data(place), small=OWN)


@pytest.mark.parametrize("other", ["lightning", "hf"])
def test_other_trainers_train_it_alike(
    place: Path, composed: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    pytest.importorskip({"lightning": "lightning", "hf": "transformers"}[other])
    monkeypatch.syspath_prepend(place)
    with allowing(["model_lab"]):
        expected, _ = trained(composed(*OWN, *data(place)))
        found, _ = trained(composed(*OWN, *data(place), f"trainer={other}"))
    for mine, its in zip(expected, found, strict=True):
        assert its == pytest.approx(mine, abs=1e-4)


@pytest.mark.filterwarnings("ignore")  # inductor's own warnings are not ours
def test_compiled_it_trains_alike(
    place: Path, composed: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    # dynamo takes the model apart as always; what a C++ compiler makes of its graphs, test_compile asks
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_(self, backend="eager", **options))
    monkeypatch.syspath_prepend(place)
    with allowing(["model_lab"]):
        expected, _ = trained(composed(*OWN, *data(place)))
        found, trainer = trained(composed(*OWN, *data(place), "trainer.compile=true"))
    assert all(layer._compiled_call_impl is not None for layer in trainer.model.layers)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for mine, its in zip(expected, found, strict=True):
        assert its == pytest.approx(mine, rel=1e-4, abs=1e-5)


def test_a_model_in_a_folder_of_transformers_trains_on(
    place: Path, composed: Callable[..., RunConfig], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = {"model_type": "llama", "vocab_size": 256, "hidden_size": 16, "intermediate_size": 32}
    sizes = {**kind, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    saved = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**sizes))
    saved.save_pretrained(tmp_path / "llama")
    small = (override for override in OWN if not override.startswith(("model", "+schedule", "trainer.max_epochs")))
    from_folder = ("model=transformers", f"model.path={tmp_path / 'llama'}", "model.seq_len=16", "model.experts=true")
    config = composed(*small, *from_folder, "trainer.max_epochs=3", *data(place))
    trainer = build_trainer(config, log=(rows := []).append)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    for name, weight in saved.state_dict().items():
        in_place = (one for other, one in before.items() if other.startswith(name.partition(".mlp.")[0] + ".mlp."))
        assert any(torch.equal(weight, one) for one in (in_place if ".mlp." in name else [before[name]])), name
    trainer.fit()
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert [row["schedule/moe_enabled"] for row in rows if "train/loss" in row] == [0] * 8 + [1] * 4

    for wrong, told in (
        (f"model.path={tmp_path}", "there is no config.json"),
        ("model.vocab_size=300", "has 256 tokens"),
        ("model.path=null", "model"),
    ):
        with pytest.raises(ConfigError, match=told):
            build_trainer(composed(*SMALLEST, *from_folder, wrong, *data(place)))


def test_a_new_model_of_transformers_has_keys_of_its_kind(place: Path, composed: Callable[..., RunConfig]) -> None:
    pytest.importorskip("transformers")
    new = ("model=transformers", "model.seq_len=16")
    for config, told in (
        ("{model_type: llama, hidden_sise: 16}", "unknown key of llama. Did you mean 'hidden_size'"),
        ("{model_type: lama}", "'lama' is unknown. Did you mean 'llama'"),
        ("{hidden_size: 16}", "model_type: missing"),
    ):
        with pytest.raises(ConfigError, match=re.escape(told)):
            build_trainer(composed(*SMALLEST, *new, f"+model.config={config}", *data(place)))
