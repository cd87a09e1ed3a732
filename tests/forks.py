"""Processes without the seconds that loading torch takes: one process loads all, and forks at each request.

A child is a real process: it has its own interpreter state, standard streams, signals and session, and can be killed.
:class:`Forks` runs the command in them; tests/training/ranks.py the ranks of a process group.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY, environment


class Server:
    """The process that forks: takes requests, a JSON object a line, and answers in JSON lines."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.stdin, self.stdout = process.stdin, process.stdout  # unbuffered, so that select sees what there is

    def ask(self, **request: Any) -> None:
        """Send a request."""
        self.stdin.write(json.dumps(request).encode() + b"\n")

    def answer(self, timeout: float | None = None) -> Any:
        """Return the next answer; None: there is none after ``timeout`` seconds."""
        ready, _, _ = select.select([self.stdout], [], [], timeout)
        return json.loads(self.stdout.readline()) if ready else None


@contextmanager
def serving(module: str) -> Iterator[Server]:
    """Start ``module`` as a server, which loads everything once."""
    command = [sys.executable, "-m", module]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment(), **pipes) as process:
        server = Server(process)
        yield server
        server.stdin.close()


def requests() -> Iterator[dict[str, Any]]:
    """Yield what this process, a server, is asked for."""
    for line in sys.stdin:
        yield json.loads(line)


def reply(answer: Any) -> None:
    """Answer the request."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


@dataclass
class Ended:
    """A child that has ended: exit code (negative: the signal), and what it printed."""

    code: int
    out: str
    err: str


class Forks:
    """Runs ``python -m MODULE ARGUMENTS`` again and again, one child at a time."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._streams: tuple[Path, Path]
        self.pid = 0

    def start(self, *arguments: str, cwd: Path, module: str = "apt_launch", env: dict[str, str] | None = None) -> int:
        """Start a child and return its process id; one that a failed test left behind is killed."""
        if self.pid:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(self.pid, signal.SIGKILL)
            self.server.answer()
            self.pid = 0
        streams = [tempfile.NamedTemporaryFile(delete=False) for _ in range(2)]  # noqa: SIM115
        self._streams = (Path(streams[0].name), Path(streams[1].name))
        names = [stream.name for stream in streams]
        self.server.ask(argv=[module, *arguments], cwd=str(cwd), streams=names, env=env or {})
        self.pid = self.server.answer()
        return self.pid

    def wait(self, timeout: float = 120.0) -> Ended:
        """Wait for the child; one that hangs is killed, and the test fails."""
        code = self.server.answer(timeout)
        hangs = code is None
        if hangs:
            os.kill(self.pid, signal.SIGKILL)
            code = self.server.answer()
        self.pid = 0
        out, err = (path.read_text(errors="replace") for path in self._streams)
        for path in self._streams:
            path.unlink()
        assert not hangs, f"no end after {timeout} s:\n{out}\n{err}"
        return Ended(code, out, err)

    def run(self, *arguments: str, cwd: Path, module: str = "apt_launch", env: dict[str, str] | None = None) -> Ended:
        """Start a child and wait for it."""
        self.start(*arguments, cwd=cwd, module=module, env=env)
        return self.wait()


@contextmanager
def forking() -> Iterator[Forks]:
    """Run the command in forks."""
    with serving("tests.forks") as server:
        yield Forks(server)


def _serve() -> None:
    import importlib

    for name in ("torch._dynamo", "wandb", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)
    for name in (
        "__main__",
        "runs.train",
        "runs.summary",
        "runs.console",
        "preview.__main__",
        "sync",
        "sweep.plan.plan",
    ):
        importlib.import_module(f"apt_launch.{name}")
    importlib.import_module("apt_model.training.trainer")
    for asked in requests():
        pid = os.fork()
        if pid == 0:
            _become(asked)
        reply(pid)
        reply(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _become(asked: dict[str, Any]) -> None:
    """Be ``python -m MODULE``, and never come back."""
    import importlib.util
    import traceback

    os.setsid()
    os.chdir(asked["cwd"])
    os.environ.update(asked["env"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, name in enumerate(asked["streams"], start=1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    argv = asked["argv"]
    found = importlib.util.find_spec(argv[0])
    module = f"{argv[0]}.__main__" if found is not None and found.submodule_search_locations else argv[0]
    sys.argv = [f"python -m {argv[0]}", *argv[1:]]
    code = 0
    try:
        importlib.import_module(module).main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1 if leaving.code else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    import atexit

    atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    _serve()
