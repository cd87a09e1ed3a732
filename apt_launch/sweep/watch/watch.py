"""``python -m apt_launch.sweep watch DIR``: a sweep while it runs, as a page that only its user can open, and in the terminal."""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from apt_launch.sweep.control.send import collected_interrupts, follow
from apt_launch.sweep.watch.live import LOOK_SECONDS, Picture, Runner, Watch
from apt_model.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

HOST: Final = "127.0.0.1"
NAMES: Final = frozenset({"127.0.0.1", "localhost"})
"""What a browser may call this machine; any other name means that a stranger's page has made its own name point here."""

SPARK: Final = 16
"""Blocks of a job's loss in the table."""


def watch(folder: Path, *, port: int | None = None, page: bool = True) -> int:
    """Show the sweep in ``folder`` until Ctrl-C; without the page, until it has ended. Return the exit code, as ``wait`` does.

    Args:
        port: of the page; None: a free one.
        page: serve it, beside the table.

    Raises:
        ConfigError: there is no sweep, or the port cannot be had.
        KeyboardInterrupt: the user has seen enough.
    """
    from rich.console import Console

    console = Console()
    if not page and not console.is_terminal:
        return follow(folder)
    live = Watch(folder)
    if not page:
        return _terminal(live, console, until_ended=True)
    with Server(live, port) as server:
        threading.Thread(target=server.serve_forever, name="page", daemon=True).start()
        console.print(
            f"Watch it at {server.address} (Ctrl-C ends the page, not the sweep)", highlight=False, soft_wrap=True
        )
        if os.environ.get("SSH_CONNECTION"):
            tunnel = f"ssh -L {server.port}:{HOST}:{server.port} {socket.gethostname()}"
            console.print(f"From your own machine, first: {tunnel}", highlight=False, soft_wrap=True)
        try:
            return _terminal(live, console, until_ended=False)
        finally:
            server.shutdown()


# --- the page ----------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves the page and its data on loopback, under an address that nobody can guess: loopback has many users.

    Args:
        live: what is shown.
        port: None: a free one.

    Raises:
        ConfigError: the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, live: Watch, port: int | None = None) -> None:
        self.live = live
        self.token = secrets.token_urlsafe(16)
        self.page = Path(__file__).with_name("watch.html").read_bytes()
        try:
            super().__init__((HOST, port or 0), _Handler)
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            why = f"is taken on {HOST}" if taken else f"cannot be had ({error})"
            raise ConfigError(f"--port: {port} {why}. Choose another, or leave it out for a free one.") from None

    def server_bind(self) -> None:
        """Take the port; HTTPServer would ask the network for a name as well."""
        socketserver.TCPServer.server_bind(self)

    @property
    def port(self) -> int:
        """The port it has."""
        return int(self.server_address[1])

    @property
    def address(self) -> str:
        """What the user opens."""
        return f"http://{HOST}:{self.port}/{self.token}/"

    @property
    def policy(self) -> str:
        """What the page may do: run its own script, use its own style, ask for its own data."""
        script, style = (_digest(self.page, name) for name in ("script", "style"))
        return (
            f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent about viewers that go away in the middle of an answer."""


def _digest(page: bytes, element: str) -> str:
    found = re.search(rf"<{element}>(.*?)</{element}>".encode(), page, re.DOTALL)
    assert found is not None
    return f"sha256-{base64.b64encode(hashlib.sha256(found.group(1)).digest()).decode()}"


class _Handler(BaseHTTPRequestHandler):
    """Answers GET of two paths; no path ever becomes the name of a file."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "apt-launch"
    sys_version = ""
    timeout = 60  # of a connection that says nothing

    def do_GET(self) -> None:
        """Answer."""
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        path = urlsplit(self.path)
        _, token, *rest = [*path.path.split("/"), ""]
        if name not in NAMES:
            self._answer(403, f"this page is at {HOST} alone.")
        elif not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._answer(403, "this is not the address that the command printed. Open that one.")
        elif rest[:-1] == [""]:
            self._answer(200, self.server.page, "text/html")
        elif rest[:-1] == ["data"]:
            since = re.fullmatch(r"since=(\d{1,12})", path.query)
            try:
                news = self.server.live.news(int(since.group(1)) if since else 0)
            except OSError as error:
                self._answer(500, f"the sweep cannot be read ({error}).")
            else:
                self._answer(200, json.dumps(news, allow_nan=False), "application/json")
        else:
            self._answer(404, "there is nothing here.")

    def _answer(self, code: int, body: str | bytes, kind: str = "text/plain") -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(code)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(content))),
            ("Content-Security-Policy", self.server.policy),
            ("Cache-Control", "no-store"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal belongs to the table."""


# --- the terminal ------------------------------------------------------------------------------------------------------


def _terminal(live: Watch, console: Console, *, until_ended: bool) -> int:
    """Keep the table up to date until Ctrl-C, or the sweep's end; then leave it as ``status`` shows it."""
    from rich.live import Live

    from apt_launch.sweep.__main__ import show

    with collected_interrupts() as interrupts:
        if not console.is_terminal:
            while not interrupts:
                time.sleep(0.1)
            raise KeyboardInterrupt
        reading = "reading what the jobs have recorded so far"
        with Live(reading, console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as screen:
            while not interrupts:
                picture = live.picture()
                screen.update(frame(picture, console.width, console.height - 4, live.problem), refresh=True)
                if picture.ended and until_ended:
                    break
                until = time.monotonic() + (0.0 if picture.behind else LOOK_SECONDS)
                while not interrupts and time.monotonic() < until:
                    time.sleep(0.05)
    show(picture.plan, picture.statuses, live.folder)
    if interrupts:
        raise KeyboardInterrupt
    return 0 if all(status.state == "done" for status in picture.statuses) else 1


def frame(picture: Picture, width: int, height: int, problem: str | None = None) -> RenderableType:
    """Return what a terminal shows: the jobs that matter most, the best one, why some failed, and the curves of one."""
    from rich.console import Group
    from rich.text import Text

    from apt_launch.sweep.__main__ import counted, table
    from apt_launch.sweep.report.report import headline

    plan, best = picture.plan, picture.findings.best
    failed = [status for status in picture.statuses if status.state in ("failed", "unknown") and status.cause]
    below = [Text(headline(picture.findings), style="bold")]
    below += [Text(f"job {status.job.number} {status.state}: {status.cause}", style="red") for status in failed[:3]]
    if problem is not None:
        below.append(Text(f"States could not be asked for, these are older: {problem}", style="magenta"))
    room = max(3, height - 3 - len(below))
    order = sorted(zip(picture.statuses, picture.runners, strict=True), key=lambda pair: _rank(pair[0].state))
    kept = order if len(order) <= room else order[: room - 1]
    left = [status for status, _ in order[len(kept) :]]
    kept = sorted(kept, key=lambda pair: pair[0].job.number)
    jobs = table(plan, [s for s, _ in kept], width, {"loss so far": [_spark(runner) for _, runner in kept]})
    above = [
        Text(f"sweep {plan.id}: {plan.told}, {plan.launcher}", style="bold"),
        Text(counted(picture.statuses) + (". It has ended." if picture.ended else "")),
    ]
    if left:
        below.insert(0, Text(f"and {counted(left)}", style="dim"))
    first = [runner for status, runner in order if status.state == "running" and runner.curves]
    first += [runner for status, runner in order if best is not None and status.job == best.job]
    curves = _curves(first[0], min(72, width - 36)) if first else []
    if curves and len(above) + 1 + len(kept) + len(below) + 1 + len(curves) <= height:
        below += [Text(f"job {first[0].told['number']}, over its tokens:", style="bold"), *map(Text, curves)]
    for text in (*above, *below):
        text.no_wrap, text.overflow = True, "ellipsis"
    return Group(*above, jobs, *below)


RANKS: Final = ("running", "failed", "unknown", "preempted", "requeued", "done")
"""Whose jobs are kept where there is no room for all."""


def _rank(state: str) -> int:
    return RANKS.index(state) if state in RANKS else len(RANKS)


def _spark(runner: Runner) -> str:
    """Draw the job's training loss, as far as it is, over the whole of its run."""
    from apt_launch.preview.terminal import blocks

    curve, total = runner.curves.get("train/loss"), runner.told.get("total")
    if curve is None or not total:
        return ""
    return blocks(_columns(curve.points, SPARK, total)).ljust(SPARK, "·")


def _columns(points: Sequence[tuple[float, float]], width: int, total: float) -> list[float]:
    """Return the value in force at the end of each of ``width`` equal parts of ``total`` tokens that has begun."""
    values = []
    for column in range(width):
        until = [value for tokens, value in points if tokens <= total * (column + 1) / width]
        if until:
            values.append(until[-1])
        if points[-1][0] <= total * (column + 1) / width:
            break
    return values or [points[-1][1]]


def _curves(runner: Runner, width: int) -> list[str]:
    """Return a line for each curve of a job and each module that is on, as a preview draws them."""
    from apt_launch.preview.terminal import blocks

    total, lines = runner.told.get("total") or 1.0, []
    for name in sorted(runner.curves, key=lambda name: (name.startswith("schedule/"), name)):
        curve = runner.curves[name]
        numbers = _columns(curve.points, width, total)
        first, last = curve.points[0][1], curve.points[-1][1]
        lines.append(f"{name.removeprefix('schedule/'):>20} {first:>7.4g} {blocks(numbers)} {last:.4g}")
    reached = runner.last.get("tokens", 0.0)
    for module, tokens in runner.switches.items():
        parts = [total * (column + 1) / width for column in range(width)]
        drawn = "".join("█" if tokens <= end else "·" for end in parts if end - total / width < reached)
        lines.append(f"{module + ' on':>20}         {drawn}")
    return lines
