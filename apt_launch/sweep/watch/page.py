"""The live page of a sweep, served on loopback."""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import json
import re
import secrets
import socketserver
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from apt_launch.sweep.watch.live import Watch
from apt_model.errors import ConfigError

HOST: Final = "127.0.0.1"
NAMES: Final = frozenset({"127.0.0.1", "localhost"})
"""Names of this machine that a browser may use; any other means that a foreign page has made its own name point here."""


class Server(ThreadingHTTPServer):
    """Serves the page and its data on loopback, under a random address: loopback is open to all users of the machine.

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
        self.page = Path(__file__).with_name("page.html").read_bytes()
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
        """Print nothing about viewers that disconnect in the middle of an answer."""


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
        """Write nothing: the terminal belongs to the table."""
