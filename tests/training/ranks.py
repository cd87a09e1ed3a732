"""Ranks of a process group, as forks of one process that has loaded torch already."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from apt_launch.config.run_config import RunConfig
from tests.conftest import SMALL
from tests.forks import Server, as_ranks, leave_alone, reply, requests, serving

Rows = list[dict[str, float]]


class Ranks:
    """Trains on as many ranks as asked for, again and again."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def train(
        self,
        world: int,
        out: Path,
        *overrides: str,
        stop: Any = None,
        resume: Path | None = None,
        overflow: Any = None,
        backend: str | None = None,
        dtype: str = "float32",
        small: Sequence[str] = SMALL,
    ) -> Rows:
        """Train on ``world`` ranks into ``out``; return the rows of the first.

        Args:
            stop: a rank and a step: that rank is asked to stop there.
            overflow: a rank, a step and a parameter: gradients are scaled as in fp16, and what that rank holds of the
                parameter's gradient overflows there.
            backend: what compiles graphs, if anything does; None: torch's default.
            dtype: of parameters.
            small: overrides that come first.

        Raises:
            AssertionError: with what a rank said when it failed.
        """
        out.mkdir()
        self.server.ask(
            world=world,
            out=str(out),
            overrides=[*small, *overrides],
            stop=stop,
            resume=str(resume) if resume else None,
            overflow=overflow,
            backend=backend,
            dtype=dtype,
        )
        codes = self.server.answer()
        assert not any(codes), "\n".join(path.read_text() for path in sorted(out.glob("error.*")))
        rows: Rows = json.loads((out / "rows.0").read_text())
        return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in rows]


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Train in forks."""
    with serving("tests.training.ranks") as server:
        yield Ranks(server)


def _serve() -> None:
    import importlib

    for name in ("torch._dynamo", "safetensors.torch", "numpy.ctypeslib", "pydantic.type_adapter"):
        importlib.import_module(name)
    for name in ("apt_model.training.fsdp", "apt_model.training.trainer", "apt_launch.runs.build"):
        importlib.import_module(name)
    from apt_launch.config.load import composed
    from apt_model.errors import ConfigError

    leave_alone()
    for job in requests():
        try:
            config = composed(job["overrides"])
        except ConfigError as error:
            (Path(job["out"]) / "error.all").write_text(str(error))
            reply([2])
            continue
        if job["backend"] is not None:  # what its first graph would load in each rank
            importlib.import_module("torch._dynamo.backends.debugging")
            importlib.import_module("torch._inductor.pattern_matcher")
        reply(as_ranks(job["world"], Path(job["out"]), partial(_train, job, config)))


def _train(job: dict[str, Any], config: RunConfig, rank: int) -> None:
    import torch

    from apt_launch.runs.build import build_trainer
    from apt_model.errors import Interrupted
    from apt_model.training.callbacks import Callback
    from apt_model.training.checkpoint import Checkpoints
    from apt_model.training.distributed import process_group

    class Overflow(Callback):
        def on_batch_end(self, trainer: Any) -> None:
            where, step, name = job["overflow"]
            if (rank, trainer.clock.step) == (where, step) and not trainer.updates_skipped:
                grad = trainer.model.get_parameter(name).grad
                getattr(grad, "_local_tensor", grad).fill_(math.inf)

    out = Path(job["out"])
    rows: Rows = []
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    if job["backend"] is not None:
        torch.compile = partial(torch.compile, backend=job["backend"])
    with process_group():
        trainer = build_trainer(
            config,
            log=rows.append,
            checkpoints=Checkpoints(out / "checkpoints", keep_last=9),
            resume=Path(job["resume"]) if job["resume"] else None,
            stop_requested=lambda: job["stop"] == [rank, trainer.clock.step],
            callbacks=[Overflow()] if job["overflow"] else [],
        )
        if job["overflow"]:
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        with suppress(Interrupted):
            trainer.fit()
        state = trainer.state_dict()
        if trainer.checkpoints is not None:
            trainer.checkpoints.wait()
        (out / f"rows.{rank}").write_text(json.dumps(rows))
        plain = {
            name: tensor for name, tensor in trainer.model.state_dict().items() if not hasattr(tensor, "device_mesh")
        }
        torch.save(plain, out / f"plain.{rank}")
        held = sum(getattr(p, "_local_tensor", p).numel() for p in trainer.model.parameters())
        (out / f"held.{rank}").write_text(str(held))
        if rank == 0:
            torch.save({"model": state["model"], "optimizer": state["optimizer"]}, out / "state")


if __name__ == "__main__":
    _serve()
