"""What moves under torch.compile: no graph more for an anneal, at most one for an event, and the values of eager."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from apt_launch.config.run_config import RunConfig
from apt_model.errors import ConfigError, Interrupted, TrainingError
from apt_model.gpt import GPT
from apt_model.layers import scheduled
from apt_model.layers.moe import MoE
from apt_model.schedule import Clock, Horizon, ScheduleRunner
from apt_model.schedule.targets import matching
from apt_model.training.callbacks import Callback
from apt_model.training.checkpoint import Checkpoints, newest_intact
from apt_model.training.schedule_driver import bind
from apt_model.training.trainer import Trainer
from tests.conftest import SMALL, until
from tests.forks import HANGS, environment
from tests.training.test_trainer import Run

EVERYWHERE = bool(os.environ.get("APT_EVERYWHERE"))
STEPS = 50 if EVERYWHERE else 16

BACKEND = "inductor" if EVERYWHERE else "aot_eager"
"""What compiles a graph where its code is not what is tested: inductor asks a C++ compiler for two seconds of each kernel."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # inductor's own warnings are not ours


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # the same random numbers compiled and eager, so that dropout can be compared
    with torch._inductor.config.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def any_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have graphs compiled by ``BACKEND``."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=BACKEND))


def gpt(num_layers: int = 1, **options) -> GPT:
    torch.manual_seed(0)
    return GPT(
        vocab_size=32,
        d_model=16,
        num_heads=2,
        num_layers=num_layers,
        d_ff=16,
        seq_len=16,
        moe=partial(MoE, num_experts=4, top_k=2, capacity_factor=1.0),
        **options,
    )


def runner(model: GPT, **curriculum) -> ScheduleRunner:
    schedule = ScheduleRunner(horizon=Horizon(epochs=1, updates_per_epoch=STEPS), **curriculum)
    bind(schedule, model)
    return schedule


def losses(model: GPT, forward, schedule: ScheduleRunner, steps: int = STEPS) -> list[float]:
    """Loss and the sum of all gradients' sizes at each step; weights stay as they are, so steps differ by values alone."""
    tokens = torch.randint(0, 32, (4, 17), generator=torch.Generator().manual_seed(1))
    told = []
    for step in range(steps):
        schedule.apply(Clock(step=step))
        torch.manual_seed(step)
        output = forward(tokens[:, :-1], tokens[:, 1:])
        loss = output.language_loss + output.auxiliary_loss
        loss.backward()
        told.append(loss.item())
        told.append(sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None))
        model.zero_grad(set_to_none=True)
    return told


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


ANNEALS = {
    "temperature": {"route_temp": {"start": 1.5, "end": 0.5, "by": "step"}},
    "capacity": {"moe_capacity": {"start": 1.5, "end": 0.5, "by": "step"}},
    "loss weight": {"align_weight": {"start": 0.0, "end": 3.0, "by": "step"}},
    "balance loss": {"anneals": {"b": {"target": "moe.balance_loss_weight", "start": 0.0, "end": 1.0, "by": "step"}}},
    "dropout": {"anneals": {"d": {"target": "blocks.*.attention.dropout", "start": 0.0, "end": 0.5, "by": "step"}}},
    "label smoothing": {"anneals": {"s": {"target": "label_smoothing", "start": 0.0, "end": 0.3, "by": "step"}}},
}


def test_other_documents_in_a_sequence_need_no_other_graph(any_backend: None) -> None:
    eager, model = gpt(num_layers=2), gpt(num_layers=2)
    model.compile_parts()
    tokens = torch.randint(0, 32, (3, 4, 16), generator=torch.Generator().manual_seed(1))
    batches = [(some, (some[:, :-1] < limit).cumsum(1)) for some, limit in zip(tokens, (4, 16, 0), strict=True)]
    for number, (some, documents) in enumerate(batches):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            sums = []
            for one in (eager, model):
                output = one(some[:, :-1], some[:, 1:], documents=documents)
                output.language_loss.backward()
                sums.append([output.language_loss.item(), *(p.grad.abs().sum().item() for p in one.parameters())])
                one.zero_grad()
            assert sums[1] == pytest.approx(sums[0], rel=1e-4)


def test_anneals_of_many_steps_add_no_graph_and_give_the_values_of_eager() -> None:
    on = {"enable_moe_at_step": 0, "enable_align_at_step": 0}
    eager, model = gpt(), gpt()
    for switched in (eager, model):
        torch.manual_seed(7)
        runner(switched, **on).apply(Clock(step=0))
    moving = [target for anneal in ANNEALS.values() for target in runner(eager, **on, **anneal).targets]

    def annealing(switched: GPT, name: str) -> ScheduleRunner:
        schedule = runner(switched, **on, **ANNEALS[name])
        scheduled.expect(switched, moving)
        return schedule

    compiled = torch.compile(
        model, fullgraph=True, backend=BACKEND
    )  # once: no anneal, of whatever it is, may ask for it again
    first = losses(model, compiled, annealing(model, "temperature"), steps=1)
    assert graphs() == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ANNEALS:
            expected = losses(eager, eager, annealing(eager, name))
            assert len(set(expected)) > 10, f"the anneal of {name} changes something"
            got = losses(model, compiled, annealing(model, name))
            assert got == pytest.approx(expected, rel=2e-4, abs=1e-4), name
            if name == "temperature":
                assert first == got[:2]
    assert graphs() == 1


def test_each_event_adds_at_most_one_graph() -> None:
    model = gpt()
    schedule = runner(
        model,
        enable_moe_at_step=2,
        enable_align_at_step=4,
        enable_voter_at_step=6,
        route_temp={"start": 1.5, "end": 0.5, "by": "step"},
        events={"off": {"disable": "align", "at": "8st"}, "more": {"grow": "moe", "to": 8, "at": "10st"}},
    )
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # graphs are counted before the backend
    tokens = torch.randint(0, 32, (4, 17))
    counts = []
    for step in range(12):
        schedule.apply(Clock(step=step))
        compiled(tokens[:, :-1], tokens[:, 1:]).language_loss.backward()
        counts.append(graphs())
    assert counts[1] == counts[0] == 1
    for event in (2, 4, 6, 8, 10):
        assert counts[event] - counts[event - 1] <= 1
        assert counts[event + 1] == counts[event]
    print(f"graphs after each of twelve updates: {counts}")


def test_attention_of_pretrained_models_is_one_graph_with_the_values_of_eager() -> None:
    model = gpt(num_kv_heads=1, qk_norm="head", tie_embeddings=False, qkv_bias=True, sliding_window=6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(0, 32, (4, 17))
    gradients = []
    for forward in (model, compiled):
        forward(tokens[:, :-1], tokens[:, 1:]).language_loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
        model.zero_grad(set_to_none=True)
    assert graphs() == 1
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, atol=1e-6), name


def test_metrics_of_routing_add_one_graph_however_often_it_changes() -> None:
    model = gpt()
    model.enable_moe(True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    tokens = torch.randint(0, 32, (4, 17))
    counts = []
    for telling in (True, False, True, False, True):
        output = compiled(tokens[:, :-1], tokens[:, 1:], with_metrics=telling)
        output.language_loss.backward()
        assert (output.routing is not None) == telling
        counts.append(graphs())
    assert counts == [1, 2, 2, 2, 2]


class Bare(nn.Module):
    """A module whose number is a Python float."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.name = "x"
        self.register_buffer("vector", torch.zeros(3))
        self.register_buffer("level", torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale * self.level


def test_a_bare_float_on_a_compiled_module_is_refused_with_the_remedy() -> None:
    for compiled in (torch.compile(Bare()), nn.Sequential(torch.compile(Bare()))):
        path = "0._orig_mod.scale" if isinstance(compiled, nn.Sequential) else "scale"
        with pytest.raises(ConfigError, match=r'compiled module.*register_buffer\("scale", torch\.tensor\(1\.0\)'):
            scheduled.setter(compiled, path)
    in_place = Bare()
    in_place.compile()
    with pytest.raises(ConfigError, match="compiled module"):
        scheduled.setter(in_place, "scale")

    plain = Bare()
    scheduled.setter(plain, "scale")(0.5)
    assert plain.scale == 0.5
    buffer = plain.level
    scheduled.setter(torch.compile(plain), "level")(0.25)
    assert plain.level is buffer
    assert buffer.item() == 0.25


def test_what_is_no_number_of_the_model_is_refused() -> None:
    for path, message in (
        ("scal", "nothing of that name"),
        ("name", "moves numbers, and this is str"),
        ("vector", r"single numbers, and this has the shape \(3,\)"),
        ("deep.scale", "nothing of that name"),
    ):
        with pytest.raises(ConfigError, match=message):
            scheduled.setter(Bare(), path)


def test_a_pattern_reaches_one_layer_or_all() -> None:
    model = gpt(num_layers=2)
    schedule = runner(
        model,
        anneals={
            "one": {"target": "blocks.1.ffn.temperature", "start": 2.0, "end": 1.0, "by": "step"},
            "all": {"target": "blocks.*.ffn.dropout", "start": 0.5, "end": 0.0, "by": "step"},
        },
    )
    schedule.apply(Clock())
    assert [layer.temperature.item() for layer in model.moe_layers] == [1.0, 2.0]
    assert [layer.dropout.item() for layer in model.moe_layers] == [0.5, 0.5]
    assert matching("blocks.*.ffn.dropout", schedule.targets) == ["blocks.0.ffn.dropout", "blocks.1.ffn.dropout"]


# --- trainer.compile --------------------------------------------------------------------------------------------------

COMPILED = ("trainer.compile=true", "trainer.max_batches_per_epoch=2", "voter.dropout=0")


class Graphs(Callback):
    """How many there are after each update."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step(self, trainer: Trainer) -> None:
        self.counts.append(graphs())


COUNTED = ("fraction", "tokens", "load", "load_entropy", "experts", "specialisation")
"""Ends of metrics that jump where rounding sends one token elsewhere."""


def same(run: Run, expected: Run) -> None:
    """Compare what a run told with what it would have told uncompiled."""
    for row, other in zip(run.told(), expected.told(), strict=True):
        assert row.keys() == other.keys()
        smooth = [name for name in row if not name.startswith(("moe/", "voter/", "val/")) or not name.endswith(COUNTED)]
        assert [row[name] for name in smooth] == pytest.approx([other[name] for name in smooth], rel=1e-3, abs=1e-4)


@pytest.mark.usefixtures("any_backend")
def test_a_compiled_run_is_the_eager_one_and_each_switch_costs_one_graph(small: Callable[..., RunConfig]) -> None:
    eager = Run(small(*COMPILED, "trainer.compile=false"))
    eager.trainer.fit()
    seen = Graphs()
    compiled = Run(small(*COMPILED), callbacks=[seen])
    compiled.trainer.fit()
    same(compiled, eager)
    # whether it works at all, blocks, loss; experts at epoch 2, alignment at 3, votes at 5
    assert seen.counts == [3, 3, 3, 3, 4, 4, 5, 5, 5, 5, 6, 6]


def test_what_inductor_makes_of_it_has_the_values_of_eager(small: Callable[..., RunConfig]) -> None:
    begin = int(EVERYWHERE)  # in the gate without the dense model before it: the shared expert is such a layer
    on = [f"schedule.enable_{name}_at_epoch={begin}" for name in ("moe", "align", "voter")]
    given = (*COMPILED, "schedule=none", *on, f"trainer.max_epochs={begin + 1}", "model.num_layers=1")
    given += ("moe.shared_expert=true",)
    eager = Run(small(*given, "trainer.compile=false"))
    eager.trainer.fit()
    compiled = Run(small(*given))
    compiled.trainer.fit()
    same(compiled, eager)


SWITCHED = {"moe": 0, "align": 1, "voter": 1}


@pytest.mark.usefixtures("any_backend")
def test_a_compiled_run_that_is_interrupted_continues_to_the_same_weights(
    small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    random = ("model.dropout=0.1", "moe.jitter=0.1", "voter.dropout=0.1")
    at = ("schedule=none", *(f"schedule.enable_{name}_at_epoch={epoch}" for name, epoch in SWITCHED.items()))
    given = (*COMPILED, *random, *at, "trainer.max_epochs=2", "trainer.precision=bf16", "model.loss_chunk=24")
    given += ("trainer.accumulate=2", "trainer.max_batches_per_epoch=4", "model.num_layers=1")
    whole = Run(small(*given))
    whole.trainer.fit()
    config = small(*given, "trainer.activation_checkpointing=true")
    before = Run(config, checkpoints=Checkpoints(tmp_path))
    before.trainer.stop_requested = lambda: before.trainer.clock.step == 1  # experts are on, alignment is not
    with pytest.raises(Interrupted):
        before.trainer.fit()
    after = Run(config, resume=newest_intact(tmp_path)[0])
    after.trainer.fit()
    assert before.told() + after.told() == whole.told()
    for name, weight in whole.weights().items():
        assert torch.equal(weight, after.weights()[name]), name


@pytest.mark.usefixtures("any_backend")
@pytest.mark.parametrize("other", ["lightning", "hf"])
def test_other_trainers_are_compiled_too(small: Callable[..., RunConfig], other: str) -> None:
    short = ("schedule=none", "schedule.enable_moe_at_epoch=1", "trainer.max_epochs=2")
    eager = Run(small(*COMPILED, *short, "trainer.compile=false"))
    eager.trainer.fit()
    compiled = Run(small(*COMPILED, *short, f"trainer={other}"))
    compiled.trainer.fit()
    assert graphs() == 4
    same(compiled, eager)


def without_compiler() -> ExitStack:
    stack = ExitStack()
    stack.enter_context(torch._inductor.utils.fresh_cache())
    stack.enter_context(torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}))
    return stack


def test_a_compiler_that_is_not_there_or_fails_is_reported_with_the_remedy(small: Callable[..., RunConfig]) -> None:
    with without_compiler(), pytest.raises(ConfigError, match=r"^trainer\.compile: .*=false"):
        Run(small(*COMPILED))
    compiled = Run(small(*COMPILED))
    told = r"^torch\.compile has failed.*trainer\.compile=false.*No working C\+\+"
    with without_compiler(), pytest.raises(TrainingError, match=told):
        compiled.trainer.fit()


def test_the_backward_pass_is_compiled_with_the_forward_pass(
    small: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, given: object) -> torch.fx.GraphModule:
        made.append(graph)
        return graph

    if not EVERYWHERE:
        from torch._dynamo.backends.common import aot_autograd

        counted = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    compiled = Run(small(*COMPILED, "model.loss_chunk=24", "trainer.activation_checkpointing=true"))
    compiled.trainer.begin_update()
    loss = compiled.trainer.loss_of(*next(compiled.trainer._updates(0))[0])
    before = len(made)
    assert EVERYWHERE or before == 1 + 2 * (graphs() - 1)  # each forwards and backwards, but what tries the compiler
    with without_compiler():
        loss.backward()
    assert len(made) == before
    assert all(parameter.grad is not None for parameter in compiled.trainer.model.parameters())


def test_a_copy_of_a_compiled_model_is_one_of_its_own(small: Callable[..., RunConfig]) -> None:
    compiled = Run(small(*COMPILED))
    tokens = torch.randint(0, 256, (2, 17))
    copy = deepcopy(compiled.trainer.model)
    with torch.no_grad():
        copy.embedding.weight.zero_()
    output = copy(tokens[:, :-1], tokens[:, 1:])
    assert output.language_loss.item() == pytest.approx(math.log(256))
    output.language_loss.backward()
    assert copy.embedding.weight.grad is not None
    assert compiled.trainer.model.embedding.weight.grad is None


def test_a_signal_to_the_whole_group_leaves_the_compiler_at_work_and_a_checkpoint(
    tmp_path: Path, text_file: Path
) -> None:
    given = [*SMALL, *COMPILED, "data=text", f"data.path={text_file}", "hydra.run.dir=run"]
    command = [sys.executable, "-m", "apt_launch", "schedule=gpt5_moe", *given]
    env = environment() | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    log = tmp_path / "run" / "train.log"
    with subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True, stderr=subprocess.PIPE) as process:

        def compiles() -> bool:
            with suppress(psutil.NoSuchProcess):  # one that has just ended
                names = [child.name() for child in psutil.Process(process.pid).children(recursive=True)]
                return "cc1plus" in names and log.is_file() and "compiled (" in log.read_text()
            return False

        until(compiles, "a block is compiled")
        os.killpg(process.pid, signal.SIGUSR2)
        assert process.wait(timeout=HANGS) == 130, process.stderr.read().decode()
    assert newest_intact(tmp_path / "run" / "checkpoints") is not None
