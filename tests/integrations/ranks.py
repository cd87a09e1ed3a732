"""Ranks that have both libraries loaded: forks, each of which calls a function of a test and leaves what it returns."""

from __future__ import annotations

import importlib
import json
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.forks import Server, leave_alone, reply, requests, serving


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
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(job["world"]):
            pid = os.fork()
            if pid == 0:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                _be_rank(rank, job)
            children.append(pid)
        reply([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])


def _be_rank(rank: int, job: dict[str, Any]) -> None:
    os.dup2(2, 1)  # the parent answers there
    out, code = Path(job["out"]), 1
    try:
        module, _, name = job["function"].partition(":")
        returned = getattr(importlib.import_module(module), name)(out=out, **job["arguments"])
        (out / f"returned.{rank}").write_text(json.dumps(returned))
        code = 0
    except BaseException:
        (out / f"error.{rank}").write_text(traceback.format_exc())
    os._exit(code)


if __name__ == "__main__":
    _serve()
