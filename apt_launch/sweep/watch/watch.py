"""``python -m apt_launch.sweep watch DIR``: a sweep while it runs, as a page that only its user can open, and in the terminal."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

from apt_launch.escapes import console
from apt_launch.sweep.control.follow import follow
from apt_launch.sweep.watch.live import Watch
from apt_launch.sweep.watch.page import HOST, Server
from apt_launch.sweep.watch.terminal import show_live


def watch(folder: Path, *, port: int | None = None, page: bool = True) -> int:
    """Show the sweep in ``folder`` until Ctrl-C; without the page, until it has ended. Return the exit code, as ``wait`` does.

    Args:
        port: of the page; None: a free one.
        page: serve it, beside the table.

    Raises:
        ConfigError: there is no sweep, or the port cannot be had.
        KeyboardInterrupt: the user has seen enough.
    """
    screen = console()
    if not page and not screen.is_terminal:
        return follow(folder, record=False)
    live = Watch(folder)
    if not page:
        return show_live(live, screen, until_ended=True)
    with Server(live, port) as server:
        threading.Thread(target=server.serve_forever, name="page", daemon=True).start()
        screen.print(
            f"Watch it at {server.address} (Ctrl-C ends the page, not the sweep)", highlight=False, soft_wrap=True
        )
        if os.environ.get("SSH_CONNECTION"):
            tunnel = f"ssh -L {server.port}:{HOST}:{server.port} {socket.gethostname()}"
            screen.print(f"From your own machine, first: {tunnel}", highlight=False, soft_wrap=True)
        try:
            return show_live(live, screen, until_ended=False)
        finally:
            server.shutdown()
