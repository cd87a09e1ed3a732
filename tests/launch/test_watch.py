"""A sweep watched while it runs: numbers worked out by hand, strangers at the door, and a real browser."""

from __future__ import annotations

import http.client
import json
import os
import pty
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hydra.core.global_hydra import GlobalHydra

from apt_launch.lease import Holder
from apt_launch.planning import gather
from apt_launch.record import RecordReader
from apt_launch.sweep.jobs.state import State
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.watch.live import MOST_POINTS, Curve, Watch
from apt_launch.sweep.watch.page import Server
from apt_launch.sweep.watch.terminal import frame
from apt_model.errors import ConfigError
from apt_model.files import write_json
from tests.browser import browsing
from tests.conftest import SMALL, until
from tests.forks import HANGS, Fork, environment, run_module

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">[/]"


def row(step: int, **more: float) -> dict[str, float]:
    """A row of a run with 32 tokens an update and 4 updates an epoch."""
    return {"step": step, "epoch": step // 4, "tokens": 32 * (step + 1), "time": 1.0 + step} | {
        name.replace("__", "/"): value for name, value in more.items()
    }


def write_state(folder: Path, state: State) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "state.json", asdict(state))


def append(folder: Path, *rows: dict[str, float]) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)


@pytest.fixture
def planned(text_file: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[Path, Plan]]]:
    """Plan a sweep whose first job is done, whose second runs in this process, and whose others are still to come."""

    def planned(*overrides: str, label: str | None = None, cause: str | None = None) -> tuple[Path, Plan]:
        folder = tmp_path / "sweep"
        plan = gather([*SMALL, "data=text", f"data.path={text_file}", *overrides])
        if label is not None:
            first, *others = plan.jobs
            plan = replace(plan, jobs=(replace(first, overrides=(f"logger.tags={label}",)), *others))
        folder.mkdir()
        plan.write(folder)
        for job, state in zip(plan.jobs, ["failed" if cause else "done", "running"], strict=False):
            own = folder / job.folder
            write_state(own, State(state=state, job_id="worker-0", cause=None if state == "running" else cause))  # type: ignore[arg-type]
            append(
                own, row(0, train__loss=5.0), row(3, train__loss=4.0 + job.number), row(3, val__loss=4.0 - job.number)
            )
            if state == "running":
                write_json(own / "lease.json", asdict(Holder.this_process()))
        return folder, plan

    yield planned
    GlobalHydra.instance().clear()


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Server]]:
    servers: list[Server] = []

    def serve(folder: Path) -> Server:
        servers.append(Server(Watch(folder)))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANGS)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.headers), content


def news(server: Server, since: int = 0) -> dict[str, Any]:
    code, _, content = ask(server, f"/{server.token}/data?since={since}")
    assert code == 200
    return json.loads(content)  # type: ignore[no-any-return]


# --- reading -----------------------------------------------------------------------------------------------------------


def test_a_record_is_read_once_and_a_line_that_is_not_whole_is_left_for_later(tmp_path: Path) -> None:
    reader = RecordReader(tmp_path / "metrics.jsonl")
    assert list(reader.rows()) == []
    append(tmp_path, row(0), row(1))
    with reader.path.open("a") as file:
        file.write('{"step": 2, "tok')
    assert [one["step"] for one in reader.rows()] == [0, 1]
    with reader.path.open("a") as file:
        file.write('ens": 96}\n')
    assert [one["tokens"] for one in reader.rows()] == [96]
    assert list(reader.rows()) == []
    assert reader.restarts == 0


def test_a_record_that_a_resume_cut_back_is_read_anew_even_where_it_has_grown_beyond(tmp_path: Path) -> None:
    reader = RecordReader(tmp_path / "metrics.jsonl")
    append(tmp_path, *map(row, range(10)))
    assert len(list(reader.rows())) == 10
    kept = reader.path.read_bytes().splitlines(keepends=True)[:4]
    reader.path.write_bytes(b"".join(kept))
    append(tmp_path, *(row(step) | {"time": 99.5} for step in range(4, 30)))
    assert [one["step"] for one in reader.rows()] == list(range(30))
    assert reader.restarts == 1
    reader.path.unlink()
    assert list(reader.rows()) == []
    assert reader.restarts == 2


def test_a_long_curve_keeps_its_ends_and_a_viewer_of_differences_sees_the_same() -> None:
    rng = random.Random(0)
    curve, seen, reading = Curve(), [], 0
    for place in range(5000):
        curve.add(1 + place // 7, float(place), place / 10)
        if place % 7 == 6 and rng.random() < 0.3:  # a reading is passed on when it is over
            first, points = curve.since(reading)
            seen = seen[:first] + points
            reading = 1 + place // 7
            assert seen == curve.points
            assert seen[-1] == (place, place / 10)
    assert len(curve.points) <= MOST_POINTS
    gaps = {int(after[0] - before[0]) for before, after in zip(curve.points[:-2], curve.points[1:-1], strict=True)}
    assert curve.points[0] == (0.0, 0.0)
    assert gaps == {16}  # 5000 / 512 = 9.8, and every second point is left out each time


def test_what_is_reported_of_a_real_sweep_is_what_its_jobs_did(tmp_path: Path, text_file: Path, serve: Any) -> None:
    folder = tmp_path / "sweep"
    overrides = [
        *SMALL,
        "data=text",
        f"data.path={text_file}",
        f"hydra.sweep.dir={folder}",
        "schedule.route_temp.end=0.6,0.8",
    ]
    result = run_module("apt_launch", "--multirun", *overrides, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    told = news(serve(folder))
    assert told["about"] == "2 asked, 2 unique, local"
    assert told["whole"]
    assert told["ended"]
    assert told["advice"] == f"python -m apt_launch.sweep report {folder}"
    one, other = told["jobs"]
    assert (one["label"], other["label"]) == ("route_temp.end=0.6", "route_temp.end=0.8")
    for job, end in ((one, 0.6), (other, 0.8)):
        own = next(folder.glob(f"{job['number']}-*"))
        rows = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
        # 6 epochs of 4 updates of 2 sequences of 16 tokens
        assert (job["state"], job["step"], job["steps"], job["total"], job["left"]) == ("done", 24, 24, 768, None)
        val = [[one["tokens"], one["val/loss"]] for one in rows if "val/loss" in one]
        assert job["curves"]["val/loss"] == {"first": 0, "points": val}
        assert [tokens for tokens, _ in val] == [128, 256, 384, 512, 640, 768]
        assert job["val/loss"] == job["compared"] == val[-1][1]
        temperature = job["curves"]["schedule/route_temp"]["points"]
        assert (temperature[0][1], temperature[-1][1]) == (1.5, pytest.approx(end))
        # moe is enabled at epoch 2, align at 3, voter at 5: with updates 8, 12 and 20, which end at 9, 13 and 21 times 32 tokens
        assert job["switches"] == {"moe": 288, "align": 416, "voter": 672}
        assert job["phase"] == "moe+align+voter"
    assert told["best"] == min((one, other), key=lambda job: job["val/loss"])["number"]
    again = news(serve(folder), since=0)
    assert len(json.dumps(again)) > 2000
    assert news(serve(folder), since=1)["jobs"] == []  # nothing is told twice


def test_rows_are_reported_as_they_come_and_a_resume_replaces_what_it_cut(planned: Any, serve: Any) -> None:
    folder, plan = planned("seed=0,1,2")
    own = folder / plan.jobs[1].folder
    server = serve(folder)
    told = news(server)
    assert [job["state"] for job in told["jobs"]] == ["done", "running", "planned"]
    assert told["headline"] == "Best so far of 2: job 1 (seed=1), val/loss 3.0000."
    assert told["jobs"][1]["curves"] == {
        "train/loss": {"first": 0, "points": [[32, 5.0], [128, 5.0]]},
        "val/loss": {"first": 0, "points": [[128, 3.0]]},
    }
    reading = told["reading"]

    append(own, row(7, train__loss=3.5, tokens_per_second=64.0))
    told = until_news(server, reading)
    (job,) = told["jobs"]
    assert not told["whole"]
    assert job["curves"] == {"train/loss": {"first": 2, "points": [[256, 3.5]]}}
    assert (job["step"], job["steps"]) == (8, 24)
    assert job["left"] == (24 - 8) * 32 / 64

    kept = (own / "metrics.jsonl").read_text().splitlines(keepends=True)[:1]
    (own / "metrics.jsonl").write_text("".join(kept))
    append(own, row(1, train__loss=float("nan")))
    (job,) = until_news(server, told["reading"])["jobs"]
    assert job["anew"]
    assert job["curves"] == {"train/loss": {"first": 0, "points": [[32, 5.0]]}}
    assert job["train/loss"] == "nan"
    assert job["val/loss"] is None


def until_news(server: Server, since: int) -> dict[str, Any]:
    """Ask until a job has something new."""
    found: dict[str, Any] = {}

    def happened() -> bool:
        found.update(news(server, since))
        return bool(found["jobs"])

    until(happened, "news of a job")
    return found


def test_jobs_that_come_later_and_states_that_change_are_seen(planned: Any) -> None:
    folder, plan = planned("seed=0,1")
    live = Watch(folder)
    assert len(live.picture().statuses) == 2
    plan.joined(gather([*plan.command[: len(plan.command) - 1], "seed=7"])).write(folder)
    (folder / plan.jobs[1].folder / "lease.json").unlink()
    until(lambda: [status.state for status in live.picture().statuses] == ["done", "failed", "planned"], "the new job")
    assert live.picture().statuses[1].cause == "the worker that ran it is gone"
    assert live.picture().ended


def test_viewers_share_one_reading(planned: Any) -> None:
    live = Watch(planned("seed=0,1")[0])
    assert {live.news(0)["reading"] for _ in range(50)} == {1}


def test_a_folder_that_vanishes_is_reported_and_what_was_known_stays(planned: Any, tmp_path: Path) -> None:
    folder, _ = planned("seed=0,1")
    live = Watch(folder)
    folder.rename(tmp_path / "elsewhere")
    until(lambda: live.news(0)["problem"], "the problem")
    assert "no plan.yaml" in live.news(0)["problem"]
    assert len(live.news(0)["jobs"]) == 2
    (tmp_path / "elsewhere").rename(folder)
    until(lambda: live.news(0)["problem"] is None, "its end")


def test_watching_loads_no_torch(planned: Any) -> None:
    folder, _ = planned("seed=0,1")
    code = (
        "import sys; from pathlib import Path; import apt_launch.sweep.watch.watch; "
        "from apt_launch.sweep.watch.live import Watch; "
        f"Watch(Path({str(folder)!r})).news(0); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANGS)


# --- the door ----------------------------------------------------------------------------------------------------------


def test_strangers_are_refused_and_no_path_reaches_a_file(planned: Any, serve: Any) -> None:
    folder, _ = planned("seed=0,1")
    server, other = serve(folder), serve(folder)
    inside = f"/{server.token}"
    assert ask(server, f"{inside}/")[0] == 200
    assert ask(server, f"{inside}/", Host=f"localhost:{server.port}")[0] == 200
    for host in (f"evil.example:{server.port}", "evil.example", f"127.0.0.1.evil.example:{server.port}", ""):
        assert ask(server, f"{inside}/data", Host=host)[0] == 403
    for path in ("/", "/data", "//", f"/{other.token}/", f"/{other.token}/data", f"/{server.token[:-1]}/", "/%2e%2e/"):
        assert ask(server, path)[0] == 403
    for path in ("plan.yaml", "../plan.yaml", "../../etc/passwd", "%2e%2e/plan.yaml", "data/", "//etc/passwd", ""):
        code, _, content = ask(server, f"{inside}/x/{path}")
        assert code == 404
        assert b"root" not in content
    assert ask(server, inside)[0] == 404
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
        assert ask(server, f"{inside}/data", method)[0] in (405, 501)
    for since in ("-1", "x", "9" * 5000, "1&since=2"):
        assert json.loads(ask(server, f"{inside}/data?since={since}")[2])["whole"]
    assert server.server_address[0] == "127.0.0.1"


def test_the_page_may_run_its_own_script_alone(planned: Any, serve: Any) -> None:
    server = serve(planned("seed=0,1")[0])
    _, headers, content = ask(server, f"/{server.token}/")
    assert re.fullmatch(
        r"default-src 'none'; script-src 'sha256-\S{44}'; style-src 'sha256-\S{44}'; connect-src 'self'; img-src data:; "
        r"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        headers["Content-Security-Policy"],
    )
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    page = content.decode()
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert "innerHTML" not in page
    assert "Server" in headers
    assert "Python" not in headers["Server"]


def test_a_port_that_is_taken_is_said_with_the_remedy(planned: Any) -> None:
    folder, _ = planned("seed=0,1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port: {port} is taken on 127\.0\.0\.1\. Choose another"):
            Server(Watch(folder), port)
        result = run_module("apt_launch.sweep", "watch", str(folder), "--port", str(port))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    with pytest.raises(ConfigError, match="--port: 99999 cannot be had"):
        Server(Watch(folder), 99999)


def test_a_folder_without_a_sweep_is_said(tmp_path: Path) -> None:
    result = run_module("apt_launch.sweep", "watch", str(tmp_path))
    assert result.returncode == 2
    assert "there is no sweep here" in result.stderr


# --- the command -------------------------------------------------------------------------------------------------------


@contextmanager
def watching(folder: Path) -> Iterator[tuple[Fork, str]]:
    """Start the command; give it and the address that it says."""
    command = ["apt_launch.sweep", "watch", str(folder)]
    process = Fork(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/\S+/", process.stdout.readline())
        assert address is not None
        yield process, address.group()
    finally:
        process.kill()
        process.communicate()


def test_the_command_says_where_it_serves_and_ctrl_c_ends_it_with_130(planned: Any) -> None:
    folder, _ = planned("seed=0,1")
    with watching(folder) as (process, address):
        where = urlsplit(address)
        connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=HANGS)
        connection.request("GET", f"{where.path}data")
        assert len(json.loads(connection.getresponse().read())["jobs"]) == 2
        process.send_signal(signal.SIGINT)  # while a viewer is connected
        rest, _ = process.communicate(timeout=HANGS)
        connection.close()
    assert process.returncode == 130
    assert rest == ""


def in_terminal(*command: str, interrupt_at: str | None = None) -> tuple[int, str]:
    """Run ``sweep`` in a terminal of 24 lines and 100 columns; Ctrl-C once it shows a text."""
    ours, theirs = pty.openpty()
    more = {"LINES": "24", "COLUMNS": "100", "TERM": "xterm"}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = Fork(["apt_launch.sweep", *command], env=environment(**more), start_new_session=True, **streams)
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says so where the other side is closed
            break
        if not chunk:
            break
        shown += chunk
        if interrupt_at is not None and interrupt_at in shown.decode(errors="ignore"):
            interrupt_at = None
            process.send_signal(signal.SIGINT)
    os.close(ours)
    return process.wait(timeout=HANGS), shown.decode()


def test_in_a_terminal_the_table_is_live_until_ctrl_c_and_the_cursor_comes_back(planned: Any) -> None:
    folder, _ = planned("seed=0,1")
    code, shown = in_terminal("watch", str(folder), interrupt_at="loss so far")
    assert code == 130
    assert "http://127.0.0.1:" in shown
    assert "Traceback" not in shown
    assert "Best so far of 2: job 1 (seed=1), val/loss 3.0000." in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


@pytest.mark.parametrize(("cause", "expected"), [(None, 0), ("it <broke>", 1)])
def test_without_the_page_it_ends_with_the_sweep_and_says_how_that_ended(
    planned: Any, cause: str | None, expected: int
) -> None:
    folder, plan = planned("seed=0,1", cause=cause)
    write_state(folder / plan.jobs[1].folder, State(state="done", job_id="worker-0"))
    code, shown = in_terminal("watch", str(folder), "--terminal")
    assert code == expected
    assert "http://" not in shown
    assert ("it <broke>" in shown) == (cause is not None)


def test_the_table_fits_every_terminal(planned: Any) -> None:
    from rich.console import Console

    folder, plan = planned("seed=range(0,30)", label=HOSTILE, cause=HOSTILE)
    append(folder / plan.jobs[1].folder, row(4, schedule__route_temp=1.5, schedule__moe_enabled=1.0))
    picture = Watch(folder).picture()
    for width in (60, 80, 120):
        for height in (10, 20, 60):
            console = Console(width=width, height=height)
            with console.capture() as capture:
                console.print(frame(picture, width, height))
            lines = capture.get().rstrip("\n").split("\n")
            assert len(lines) <= height
            assert max(map(len, lines)) <= width
            assert any("seed=1 " in line for line in lines)  # the one that runs
            assert any(line.startswith("and ") and line.endswith(" planned") for line in lines) == (height < 60)
            curves = [line.split() for line in lines if line.strip().startswith(("route_temp", "moe enabled"))]
            # 5 of 24 updates: 5 / 24 of the width has begun
            assert [words[:2] for words in curves] == (
                [["route_temp", "1.5"], ["moe", "enabled"]] if height == 60 else []
            )


# --- the browser -------------------------------------------------------------------------------------------------------


def test_a_browser_shows_rows_and_curves_as_they_come(planned: Any, tmp_path: Path) -> None:
    folder, plan = planned("seed=0,1,2", label=HOSTILE, cause=HOSTILE)
    own = folder / plan.jobs[1].folder
    append(own, row(4, train__loss=3.0, schedule__route_temp=1.5, schedule__moe_enabled=1.0))
    with watching(folder) as (process, address), browsing(tmp_path / "profile") as browser:
        browser.look(width=1400)
        browser.open(address)
        browser.wait(
            "document.querySelectorAll('#rows tr').length === 3 && document.querySelectorAll('path.line').length > 6"
        )

        cells = browser.evaluate(
            "[...document.querySelectorAll('#rows tr')].map(r => [...r.cells].map(c => c.innerText))"
        )
        assert [line[0].strip() for line in cells] == ["0", "1", "2"]
        assert [line[2] for line in cells] == ["✗ failed", "▶ running", "· planned"]
        assert cells[1][3].strip() == "5/24"
        assert cells[1][5:7] == ["3.0000", "3.0000"]
        assert "★ best so far" in cells[1][1]
        assert browser.evaluate("document.getElementById('answer').textContent").startswith("Best so far of 2: job 1")
        curves = "[...document.querySelectorAll('figure')].map(f => [f.querySelector('figcaption span').textContent, \
            f.querySelectorAll('path').length])"
        assert browser.evaluate(curves) == [["val/loss", 2], ["train/loss", 2], ["route_temp", 1]]
        assert browser.evaluate("document.querySelectorAll('figure .of').length") == 3  # "moe enabled" in each
        # 160 tokens are 5 of 24 updates: the run's curve has 5 / 24 of the axis behind it
        x = "charts.get('train/loss').x"
        assert browser.evaluate(f"({x}(160) - {x}(0)) / ({x}(768) - {x}(0))") == pytest.approx(5 / 24)

        # what users and failures write is text, whatever it says
        assert "document.title='taken'" in cells[0][1]
        assert browser.evaluate("[document.scripts.length, document.images.length]") == [1, 0]
        assert browser.evaluate("document.title") == "✗ 0/3 done · sweep " + plan.id

        append(own, row(11, train__loss=2.5, val__loss=2.0))
        browser.wait("document.querySelectorAll('#rows tr')[1].cells[6].innerText === '2.0000'")
        assert browser.evaluate("jobs.get(1).curves['val/loss']") == [[128, 3.0], [384, 2.0]]
        assert browser.evaluate("document.querySelectorAll('#losses figure')[0].querySelectorAll('circle').length") == 3

        (own / "metrics.jsonl").write_text("")  # its next attempt has no checkpoint to resume from
        browser.wait("document.querySelectorAll('#rows tr')[1].cells[6].innerText === ''")
        assert browser.evaluate(curves) == [["val/loss", 1], ["train/loss", 1], ["route_temp", 0]]
        append(own, row(11, train__loss=2.5, val__loss=2.0, schedule__route_temp=1.5))
        browser.wait("document.querySelectorAll('#rows tr')[1].cells[6].innerText === '2.0000'")

        browser.evaluate("[...document.querySelectorAll('th button')].find(b => b.innerText === 'val/loss').click()")
        order = "[...document.querySelectorAll('#rows tr')].map(r => r.cells[0].innerText.trim()).join()"
        assert browser.evaluate(order) == "1,0,2"
        browser.evaluate("document.querySelector('#rows button').focus()")
        assert browser.evaluate("document.querySelectorAll('path.line.on').length") == 3

        for width in (1400, 400):
            for scheme, paper in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 26)")):
                browser.look(width=width, scheme=scheme)
                assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == paper
                wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                assert browser.evaluate(f"new Promise(r => requestAnimationFrame(() => r({wide})))") <= 0
        assert browser.said == []

        process.send_signal(signal.SIGINT)
        browser.wait("/^not connected since \\d\\d:\\d\\d:\\d\\d/.test(document.getElementById('live').innerText)")
