"""A real browser for the tests: Debian's Chromium without a window, spoken to over its DevTools pipe."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.packages import needed

QUIET = [f"--disable-{name}" for name in ("gpu", "quic", "background-networking", "component-update", "sync")]


def chromium() -> str:
    """Return the browser's command."""
    return shutil.which("chromium") or shutil.which("google-chrome") or needed("chromium")


class Browser:
    """One page of one browser; whatever its console says is kept in ``said``."""

    def __init__(self, process: subprocess.Popen[bytes], reading: int, writing: int) -> None:
        self.process = process
        self.said: list[str] = []
        self._reading, self._writing = reading, writing
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol; return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            told = answer.get("params", {})
            if answer.get("method") == "Runtime.exceptionThrown":
                self.said.append(json.dumps(told["exceptionDetails"]))
            elif answer.get("method") == "Log.entryAdded":
                self.said.append(told["entry"]["text"])
            elif answer.get("method") == "Runtime.consoleAPICalled":
                self.said.append(json.dumps(told["args"]))

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._reading, 1 << 20)
            assert chunk, "the browser is gone"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def look(self, *, width: int, height: int = 900, scheme: str = "light") -> None:
        """Give the page a size and a colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, address: str) -> None:
        """Go there."""
        self.call("Page.navigate", url=address)

    def evaluate(self, expression: str) -> Any:
        """Return what a JavaScript expression gives, also later."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until the page makes ``condition`` true, and look again at each of its changes."""
        self.evaluate(
            f"""new Promise((resolve, reject) => {{
              const seen = () => {{ if ({condition}) {{ watcher.disconnect(); resolve(true); }} }};
              const watcher = new MutationObserver(seen);
              watcher.observe(document, {{subtree: true, childList: true, characterData: true, attributes: true}});
              setTimeout(() => reject(new Error("waited for " + {condition!r})), 60000);
              seen();
            }})"""
        )

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Write what it shows as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """Start a browser that keeps its things in ``profile``; end it."""
    command = [chromium(), "--headless", "--no-sandbox", "--no-first-run", *QUIET, "--remote-debugging-pipe"]
    pipes = [*os.pipe(), *os.pipe()]
    theirs_in, ours_out, ours_in, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in pipes)
    for end in pipes:
        os.close(end)

    def hand_over() -> None:  # the protocol's pipes are 3 and 4
        os.dup2(theirs_in, 3)
        os.dup2(theirs_out, 4)

    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile}"],
        preexec_fn=hand_over,
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(process, ours_in, ours_out)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours_in)
        os.close(ours_out)
