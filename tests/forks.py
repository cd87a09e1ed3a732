"""Processes without the seconds that loading torch takes: one process loads all, and forks at each request.

A child is a real process: it has its own interpreter state, environment, standard streams, signals and session, and can be
killed. :class:`Fork` is used as ``subprocess.Popen`` is, :func:`run_module` as ``subprocess.run``; :class:`Forks` is what
tests that call many commands have. What such a child starts by ``sys.executable -m`` (a sweep's worker, who paints) is
forked there, too: ``sys.executable`` is a script with the text of tests/forked_python.py, which asks for it.
tests/training/ranks.py has ranks of a process group.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

from tests import hold

REPOSITORY = Path(__file__).parent.parent
HANGS = 600.0
"""Seconds after which a process is taken to hang; nothing is expected to be faster."""

ADDRESS = "APT_TESTS_FORKS"
"""The environment variable with the address of the process that forks."""

COMPILER = "APT_TESTS_COMPILER"
"""The environment variable with what compiles graphs in a child; without it, torch's default."""

PYTHON = "APT_TESTS_PYTHON"
"""The environment variable with the path of the interpreter that tests run under."""


def environment(**more: str) -> dict[str, str]:
    """The environment of a command under test: no key, no colours, nothing that reaches out."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "HYDRA_"))}
    # threads that wait for each other sleep meanwhile: spinning, they would starve whoever else is at work here
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return kept | threads | {"WANDB_ERROR_REPORTING": "false", "PYTHONUNBUFFERED": "1"} | more


def attempts(timeout: float) -> Iterator[None]:
    """Yield for ``timeout`` seconds, resting in between: nine times as long as a core was kept, which is left to others."""
    end, kept = time.monotonic() + timeout, sum(os.times()[:4])
    while True:
        yield
        if time.monotonic() > end:
            return
        time.sleep(min(1.0, max(0.02, 9 * (sum(os.times()[:4]) - kept))))
        kept = sum(os.times()[:4])


class Server:
    """A process that answers requests, a JSON object a line, in JSON lines."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self.stdin, self.stdout = process.stdin, process.stdout  # unbuffered, so that select sees what there is

    def ask(self, **request: Any) -> None:
        """Send a request."""
        self.stdin.write(json.dumps(request).encode() + b"\n")

    def answer(self, timeout: float | None = None) -> Any:
        """Return the next answer; None: there is none after ``timeout`` seconds."""
        ready, _, _ = select.select([self.stdout], [], [], timeout)
        return json.loads(self.stdout.readline()) if ready else None

    def close(self) -> None:
        """Ask it to end, and wait."""
        self.stdin.close()
        self.process.wait()
        self.stdout.close()


def start_server(module: str, *arguments: str) -> Server:
    """Start ``module`` as a server, which loads everything once."""
    command = [sys.executable, "-m", module, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    return Server(subprocess.Popen(command, cwd=REPOSITORY, env=environment(), **pipes))


@contextmanager
def serving(module: str, *arguments: str) -> Iterator[Server]:
    """Have ``module`` as a server meanwhile."""
    server = start_server(module, *arguments)
    try:
        yield server
    finally:
        server.close()


def requests() -> Iterator[dict[str, Any]]:
    """Yield what this process, a server, is asked for."""
    for line in sys.stdin:
        yield json.loads(line)


def leave_alone() -> None:
    """Have what is loaded be no garbage ever: neither looked at again nor, by a fork, copied for that."""
    gc.collect()
    gc.freeze()


def reply(answer: Any) -> None:
    """Answer the request."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def as_ranks(world: int, out: Path, work: Callable[[int], object]) -> list[int]:
    """Call ``work`` with its rank in as many forks, with the environment that torchrun gives them; return their exit codes.

    What one raises is in ``out``, in ``error.RANK``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.dup2(2, 1)  # the parent answers there, and gloo of torch 2.10 says whom it is connected to
            code = 1
            try:
                work(rank)
                code = 0
            except BaseException:
                (out / f"error.{rank}").write_text(traceback.format_exc())
            os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


# --- asking for children ---------------------------------------------------------------------------------------------


@cache
def address(*loaded: str) -> str:
    """Return where to ask for children, starting the process that forks them if there is none yet.

    It ends with this process, and takes with it what it has forked. Who is started by one that has it shares it.

    Args:
        loaded: modules that it has loaded besides what every run needs.
    """
    if not loaded and ADDRESS in os.environ:
        return os.environ[ADDRESS]
    folder = tempfile.mkdtemp(prefix="forks-")
    path = f"{folder}/socket"
    server = start_server("tests.forks", path, *loaded)
    assert server.answer() == "listening"

    def end() -> None:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return path


def python(address: str) -> Path:
    """Return what stands for the interpreter in children of the process at ``address``."""
    return Path(address).with_name("python")


class Fork:
    """``python -m MODULE ARGUMENTS`` as a fork; the part of ``subprocess.Popen`` that tests use.

    Args:
        command: module and arguments, as after ``python -m``.
        stdin, stdout, stderr: as for ``Popen``; ``stdin=None`` is nothing to read.
        text: whether pipes give text.
        start_new_session: whether it leads a session of its own.
        forks: whether what it starts by ``sys.executable -m`` is forked, too; not where SLURM is to have it in its hands.
        loaded: see :func:`address`.
        largest_file: the most bytes that a file may have: a full disk that needs no privilege.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        text: bool = True,
        start_new_session: bool = False,
        forks: bool = True,
        loaded: Sequence[str] = (),
        largest_file: int | None = None,
    ) -> None:
        self.args = list(command)
        self.returncode: int | None = None
        self.stdin: IO[Any] | None = None
        self.stdout: IO[Any] | None = None
        self.stderr: IO[Any] | None = None
        ours: list[int] = []

        def end(name: str, given: Any, number: int) -> int:
            if given is subprocess.PIPE:
                reading, writing = os.pipe()
                its, own = (reading, writing) if number == 0 else (writing, reading)
                setattr(self, name, os.fdopen(own, ("w" if number == 0 else "r") + ("" if text else "b")))
            elif given in (None, subprocess.DEVNULL):
                if given is None and number:
                    return number
                its = os.open(os.devnull, os.O_RDWR)
            else:
                return given if isinstance(given, int) else given.fileno()
            ours.append(its)
            return its

        ends = [end("stdin", stdin, 0), end("stdout", stdout, 1)]
        ends.append(ends[1] if stderr is subprocess.STDOUT else end("stderr", stderr, 2))
        given = environment() if env is None else env
        asked = {
            "argv": self.args,
            "cwd": str(cwd or Path.cwd()),
            "env": {**given, ADDRESS: address(*loaded), PYTHON: sys.executable},
            "session": start_new_session,
            "forks": forks,
            "ignored": [],
            "umask": _umask(),
            "largest_file": largest_file,
        }
        self.connection = ask_for_a_child(address(*loaded), asked, ends)
        for number in ours:
            os.close(number)
        self._answers = self.connection.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """Return the exit code (negative: the signal); None: it runs."""
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float = HANGS) -> int:
        """Wait for the end."""
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def _end(self) -> None:
        self.returncode = int(self._answers.readline())
        self._answers.close()
        self.connection.close()

    def communicate(self, timeout: float = HANGS) -> tuple[Any, Any]:
        """Read what is printed up to the end; a process that hangs is killed, and the test fails."""
        if self.stdin is not None:
            self.stdin.close()
        read: dict[str, Any] = {"stdout": None, "stderr": None}

        def drain(name: str, stream: IO[Any]) -> None:
            read[name] = stream.read()
            stream.close()

        streams = {name: stream for name in read if (stream := getattr(self, name)) is not None and not stream.closed}
        threads = [threading.Thread(target=drain, args=one, daemon=True) for one in streams.items()]
        for thread in threads:
            thread.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
            for thread in threads:
                thread.join(5)
            raise AssertionError(f"{self.args} had not ended after {timeout} s:\n{read}") from None
        for thread in threads:
            thread.join(timeout)
        return read["stdout"], read["stderr"]

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, if it still runs."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def ask_for_a_child(where: str, asked: Mapping[str, Any], streams: Sequence[int]) -> socket.socket:
    """Ask the process at ``where`` for a child; its number and its exit code come back, a line each."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(where)
    content = json.dumps(asked).encode() + b"\n"
    sent = socket.send_fds(connection, [content], list(streams))
    connection.sendall(content[sent:])
    return connection


def run_module(
    module: str, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module`` to its end; ``more``: see :class:`Fork`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = Fork([module, *arguments], cwd=cwd, env=env, **pipes, **more)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def run_fresh(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with ``command`` to its end, from an interpreter that has loaded nothing."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


@dataclass
class Ended:
    """A child that has ended: exit code (negative: the signal), and what it printed."""

    code: int
    out: str
    err: str


class Forks:
    """Runs ``python -m MODULE ARGUMENTS`` again and again, one child at a time."""

    def __init__(self) -> None:
        self.child: Fork | None = None

    def start(self, *arguments: str, cwd: Path, module: str = "apt_launch", env: dict[str, str] | None = None) -> int:
        """Start a child in a session of its own and return its process id; one that a failed test left is killed."""
        self.close()
        self.streams = {name: tempfile.TemporaryFile("w+") for name in ("stdout", "stderr")}  # noqa: SIM115
        self.child = Fork(
            [module, *arguments], cwd=cwd, env=environment(**(env or {})), start_new_session=True, **self.streams
        )
        return self.child.pid

    def wait(self, timeout: float = HANGS) -> Ended:
        """Wait for the child; one that hangs is killed, and the test fails."""
        child = self.child
        assert child is not None
        hangs = False
        try:
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            hangs = True
        self.close()
        read = []
        for stream in self.streams.values():
            stream.seek(0)
            read.append(stream.read())
            stream.close()
        assert not hangs, f"no end after {timeout} s:\n{read}"
        return Ended(child.wait(), *read)

    def run(self, *arguments: str, cwd: Path, module: str = "apt_launch", env: dict[str, str] | None = None) -> Ended:
        """Start a child and wait for it."""
        self.start(*arguments, cwd=cwd, module=module, env=env)
        return self.wait()

    def close(self) -> None:
        """Kill what is left."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child = None


# --- the process that forks ------------------------------------------------------------------------------------------


def _serve(path: str, *more: str) -> None:
    import importlib

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    # not env: python3 may be a script that looks for one, a tenth of a second each time
    python(path).write_text(f"#!{sys.executable} -SE\n{(REPOSITORY / 'tests/forked_python.py').read_text()}")
    python(path).chmod(0o700)
    reply("listening")  # who connects now waits until all is loaded
    for name in (
        *("torch._dynamo", "safetensors.torch", "scipy.special", "tokenizers", "pydantic.type_adapter", "faulthandler"),
        *("wandb", "wandb.apis.public", "wandb.sdk.launch", "requests", "submitit", "submitit.core.submission"),
        *("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "jinja2"),
        "hydra._internal.logging_config",
    ):
        importlib.import_module(name)
    for name in (
        *("runs.train", "runs.summary", "runs.console", "runs.before_start", "sync", "application", "generate"),
        *("preview.__main__", "preview.page", "preview.terminal", "config.explain", "config.profile_file"),
    ):
        importlib.import_module(f"apt_launch.{name}")
    for name in ("plan.plan", "plugins", "control.send", "backends.registry", "jobs.process", "report.report", "cli"):
        importlib.import_module(f"apt_launch.sweep.{name}")
    for name in ("trainer", "memory", "watchdogs"):
        importlib.import_module(f"apt_model.training.{name}")
    for name in ("apt_model.layouts.pretrained", *more):
        importlib.import_module(name)
    from apt_launch.config.load import composed, composing
    from apt_launch.config.schedule_plot import draw_schedule, sheets
    from apt_launch.runs.provenance import packages

    packages()
    config = composed(["schedule=gpt5_moe", "logger=none"])
    with composing() as compose:  # what most commands under test choose is merged once
        for chosen in ((), ("schedule=gpt5_moe",), ("schedule=none",)):
            for launcher in ((), ("hydra/launcher=slurm",)):
                compose([*chosen, *launcher, "data=text"])
    with tempfile.TemporaryDirectory() as folder:  # fonts and much else are looked for at the first use
        draw_schedule(sheets({"": config.program}), Path(folder, "schedule.png"))
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # torch takes its operators apart one by one, a tenth of a second; a child just ends
    leave_alone()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the tests, which close our standard input at their end
    waking, woken = socket.socketpair()
    woken.setblocking(False)
    waking.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    children: dict[int, socket.socket] = {}
    bound: dict[socket.socket, int] = {}  # children that are killed with the process that they stand for
    while True:
        ready, _, _ = select.select([listening, waking, sys.stdin, *bound], [], [])
        for connection in {*ready} & {*bound}:
            os.kill(bound.pop(connection), signal.SIGKILL)  # nobody says anything more: its end is closed
        if waking in ready:
            waking.recv(4096)
        for pid, code in _ended(children):
            bound.pop(children[pid], None)
            with suppress(OSError), children.pop(pid) as connection:  # who asked may be gone
                connection.sendall(f"{code}\n".encode())
        if sys.stdin in ready:
            signal.set_wakeup_fd(-1)
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            return
        if listening in ready:
            connection, _ = listening.accept()
            content, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
            while content and not content.endswith(b"\n"):
                content += connection.recv(1 << 16)
            if not content:
                connection.close()
                continue
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (listening, waking, woken, connection, *children.values()):
                    other.close()
                _become(json.loads(content), streams)
            for number in streams:
                os.close(number)
            children[pid] = connection
            if json.loads(content).get("bound"):
                bound[connection] = pid
            connection.sendall(f"{pid}\n".encode())


def _ended(children: Mapping[int, object]) -> Iterator[tuple[int, int]]:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        yield pid, os.waitstatus_to_exitcode(status)


def _become(asked: dict[str, Any], streams: list[int]) -> None:
    """Be ``python -m MODULE``, and never come back."""
    import runpy
    import traceback

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for number in asked["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.umask(asked["umask"])
    if (most := asked.get("largest_file")) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    if asked["session"]:
        os.setsid()
    os.chdir(asked["cwd"])
    sys.path.insert(0, asked["cwd"])  # as python -m has it
    os.environ.clear()
    os.environ.update(asked["env"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in {*streams} - {0, 1, 2}:
        os.close(stream)
    sys.executable = str(python(os.environ[ADDRESS])) if asked["forks"] else os.environ[PYTHON]
    hold.install()
    if COMPILER in os.environ:
        import torch

        torch.compile = partial(torch.compile, backend=os.environ[COMPILER])
    module, *arguments = asked["argv"]
    sys.argv = [module, *arguments]
    code = 0
    try:
        if module not in ("apt_launch", "apt_launch.preview", "apt_launch.sweep"):
            sys.modules.pop(module, None)  # run, not imported: as if for the first time
        else:
            sys.modules.pop(f"{module}.__main__", None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1 if leaving.code else 0
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        code = code or 120  # as Python itself does when what was printed cannot be delivered
    os._exit(code)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
