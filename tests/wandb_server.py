"""A loopback server that the real W&B client and agent talk to: it notes what reaches it."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Answers what the client asks for; ``sweep`` and ``commands`` are what an agent is told, one run at a time."""

    def __init__(self, sweep: str = "", commands: list[dict[str, Any]] | None = None) -> None:
        self.sweep = sweep
        self.commands = list(commands or [])
        self.asked: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.summary: dict[str, dict[str, Any]] = {}
        self.url = ""
        self.bodies: list[bytes] = []
        self.away = threading.Event()
        """While it is set, nobody answers: requests end in error 503."""

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data of a GraphQL query."""
        entity = {"id": "entity", "name": "tester"}
        if "agentHeartbeat" in query:
            busy = json.loads(variables.get("runState") or "{}")
            command = [self.commands.pop(0)] if self.commands and not busy else []
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(command)}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "SweepWithRuns" in query:
            sweep = {"id": "sweep", "name": "sweep", "method": "grid", "state": "RUNNING", "config": self.sweep}
            more = {
                "description": "",
                "heartbeatAt": None,
                "updatedAt": None,
                "earlyStopJobRunning": False,
                "controller": None,
            }
            return {"project": {"sweep": sweep | more | {"scheduler": None, "priorRuns": [], "runs": {"edges": []}}}}
        if "upsertBucket" in query:
            name = variables.get("name") or "run"
            self.runs[name] = {**self.runs.get(name, {}), **{k: v for k, v in variables.items() if v is not None}}
            project = {"id": "project", "name": "apt-launch", "entity": entity}
            bucket = {
                "id": name,
                "name": name,
                "displayName": name,
                "description": "",
                "config": variables.get("config"),
            }
            more = {"sweepName": variables.get("sweep"), "project": project, "historyLineCount": 0, "tags": []}
            return {"upsertBucket": {"bucket": bucket | more, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables.get("files", [])]
            run = variables.get("run", "run")
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        if "viewer" in query.lower():
            return {
                "viewer": entity | {"username": "tester", "flags": "{}", "teams": {"edges": []}, "entity": "tester"}
            }
        if "serverInfo" in query or "ServerFeatures" in query:
            return {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}}
        if "RunResumeStatus" in query or "bucket(" in query:
            bucket = self.state_of(str(variables.get("name")))
            return {"model": {"id": "project", "name": "apt-launch", "entity": entity, "bucket": bucket}}
        return {}

    def state_of(self, run: str) -> dict[str, Any] | None:
        """Return what a client that resumes ``run`` is told; None: there is no such run."""
        if run not in self.runs:
            return None
        rows = self.history.get(run, [])
        return {
            "name": run,
            "displayName": run,
            "summaryMetrics": json.dumps(self.summary.get(run, {})),
            "logLineCount": 0,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }

    def stream(self, run: str, content: dict[str, Any]) -> None:
        """Note rows and summary of a run."""
        for name, lines in ((name, chunk.get("content", [])) for name, chunk in content.get("files", {}).items()):
            rows = [json.loads(line) for line in lines if name.endswith((".jsonl", "summary.json"))]
            if name == "wandb-history.jsonl":
                self.history.setdefault(run, []).extend(rows)
            elif name == "wandb-summary.json":
                for row in rows:
                    self.summary.setdefault(run, {}).update(row)


@contextmanager
def serving(server: WandbServer) -> Iterator[WandbServer]:
    """Serve on a free port meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self._body()
            if self._is_away():
                return
            if self.path.endswith("/graphql"):
                asked = json.loads(body)
                server.asked.append(asked.get("operationName") or asked["query"][:60])
                self._reply({"data": server.answer(asked["query"], asked.get("variables") or {})})
                return
            if self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body))
            self._reply({})

        def do_PUT(self) -> None:
            self._body()
            if not self._is_away():
                self._reply({})

        def do_GET(self) -> None:
            if not self._is_away():
                self._reply({})

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server.bodies.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            return server.bodies[-1]

        def _is_away(self) -> bool:
            if server.away.is_set():
                self._reply({"error": "away"}, 503)
            return server.away.is_set()

        def _reply(self, content: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *about: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing: a client that is killed resets its connections."""

    http = Quiet(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
