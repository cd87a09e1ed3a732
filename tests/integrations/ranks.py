"""Ranks that have both libraries loaded: forks, each of which calls a function of a test and leaves what it returns."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.forks import Server, as_ranks, leave_alone, reply, requests, serving


class Ranks:
    """Calls ``MODULE:FUNCTION`` on as many ranks as asked for, again and again."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def call(self, world: int, out: Path, function: str, **arguments: Any) -> list[Any]:
        """Return what ``function(out=..., **arguments)`` returns on each rank, as JSON has it.

        Raises:
            AssertionError: with what a rank said when it failed.
        """
        out.mkdir()
        self.server.ask(world=world, out=str(out), function=function, arguments=arguments)
        codes = self.server.answer()
        assert not any(codes), "\n".join(path.read_text() for path in sorted(out.glob("error.*")))
        return [json.loads((out / f"returned.{rank}").read_text()) for rank in range(world)]


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Call functions in forks."""
    with serving("tests.integrations.ranks") as server:
        yield Ranks(server)


def _serve() -> None:
    for name in ("torch._dynamo", "safetensors.torch", "apt_model.training.trainer", "apt_launch.runs.build"):
        importlib.import_module(name)
    for name in ("of_lightning", "of_transformers", "test_ranks"):
        importlib.import_module(f"tests.integrations.{name}")
    leave_alone()
    for job in requests():
        reply(as_ranks(job["world"], Path(job["out"]), partial(_be_rank, job)))


def _be_rank(job: dict[str, Any], rank: int) -> None:
    out = Path(job["out"])
    module, _, name = job["function"].partition(":")
    returned = getattr(importlib.import_module(module), name)(out=out, **job["arguments"])
    (out / f"returned.{rank}").write_text(json.dumps(returned))


if __name__ == "__main__":
    _serve()
