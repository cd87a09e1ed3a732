"""The command in a process of its own, without the seconds that loading torch takes: one process loads all, and forks.

A child is a real process: it has its own interpreter state, standard streams, signals and session, and can be killed.
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
from typing import IO

from tests.conftest import REPOSITORY, environment


@dataclass
class Ended:
    """A child that has ended: exit code (negative: the signal), and what it printed."""

    code: int
    out: str
    err: str


class Forks:
    """Runs ``python -m MODULE ARGUMENTS`` again and again, one child at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._streams: tuple[Path, Path]
        self.pid = 0

    def start(self, *arguments: str, cwd: Path, module: str = "apt_launch", env: dict[str, str] | None = None) -> int:
        """Start a child and return its process id; one that a failed test left behind is killed."""
        if self.pid:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(self.pid, signal.SIGKILL)
            self._answer()
            self.pid = 0
        streams = [tempfile.NamedTemporaryFile(delete=False) for _ in range(2)]  # noqa: SIM115
        self._streams = (Path(streams[0].name), Path(streams[1].name))
        asked = {
            "argv": [module, *arguments],
            "cwd": str(cwd),
            "streams": [s.name for s in streams],
            "env": env or {},
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        self.pid = self._answer()
        return self.pid

    def wait(self, timeout: float = 120.0) -> Ended:
        """Wait for the child; one that hangs is killed, and the test fails."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not ready:
            os.kill(self.pid, signal.SIGKILL)
        code = self._answer()
        self.pid = 0
        out, err = (path.read_text(errors="replace") for path in self._streams)
        for path in self._streams:
            path.unlink()
        assert ready, f"no end after {timeout} s:\n{out}\n{err}"
        return Ended(code, out, err)

    def run(self, *arguments: str, cwd: Path, module: str = "apt_launch", env: dict[str, str] | None = None) -> Ended:
        """Start a child and wait for it."""
        self.start(*arguments, cwd=cwd, module=module, env=env)
        return self.wait()

    def _answer(self) -> int:
        stdout: IO[str] | None = self.process.stdout
        assert stdout is not None
        return int(stdout.readline())


@contextmanager
def forking() -> Iterator[Forks]:
    """Load everything once."""
    command = [sys.executable, "-m", "tests.forks"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Forks(process)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    import importlib

    for name in ("torch._dynamo", "wandb", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)
    for name in ("__main__", "run", "summary", "plots", "preview", "sync", "plan", "console"):
        importlib.import_module(f"apt_launch.{name}")
    importlib.import_module("apt_model.training.trainer")
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(asked)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


def _become(asked: dict[str, object]) -> None:
    """Be ``python -m MODULE``, and never come back."""
    import importlib
    import traceback

    os.setsid()
    os.chdir(str(asked["cwd"]))
    os.environ.update(asked["env"])  # type: ignore[call-overload]
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, name in enumerate(asked["streams"], start=1):  # type: ignore[arg-type,var-annotated]
        os.dup2(os.open(name, os.O_WRONLY), number)
    argv: list[str] = asked["argv"]  # type: ignore[assignment]
    module = argv[0] if "." in argv[0] else f"{argv[0]}.__main__"
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
