"""Who may write into a folder: the lease is taken, taken over, or refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from apt_launch import lease as module
from apt_launch.lease import Holder, Lease, heartbeats, holder_is_alive, is_alive, read_holder
from apt_model.errors import ConfigError
from tests.forks import HANGS


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a heartbeat every tenth of a second, not every two seconds."""
    monkeypatch.setattr(module, "INTERVAL", 0.1)


@pytest.fixture
def gone() -> Holder:
    """A holder of this host whose process has ended."""
    code = "import json, dataclasses; from apt_launch.lease import Holder; "
    code += "print(json.dumps(dataclasses.asdict(Holder.this_process('7', 0))))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANGS)
    return Holder(**json.loads(printed.stdout))


ELSEWHERE = Holder("another-host", 1, "100", "7", 0, "token of another host")


@contextmanager
def touched(path: Path) -> Iterator[None]:
    """Send heartbeats of a holder of another host."""
    over = threading.Event()

    def touch() -> None:
        while not over.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def held(path: Path, holder: Holder) -> Path:
    path.write_text(json.dumps(asdict(holder)))
    return path


def me(job_id: str | None = None, restart: int = 0) -> Holder:
    return Holder.this_process(job_id, restart)


def test_a_free_folder_is_taken_and_given_back(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease.json", me())
    assert read_holder(lease.path) == lease.holder
    assert holder_is_alive(tmp_path) is True
    assert not lease.lost
    lease.release()
    assert list(tmp_path.iterdir()) == []
    assert holder_is_alive(tmp_path) is False


@pytest.mark.parametrize("job_id", [None, "7", "8"])
def test_a_holder_of_this_host_that_is_gone_loses_it(tmp_path: Path, gone: Holder, job_id: str | None) -> None:
    assert gone.alive is False
    lease = Lease(held(tmp_path / "lease.json", gone), me(job_id))
    assert read_holder(lease.path) == lease.holder
    lease.release()


def test_a_process_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    assert me().alive is True
    lease = Lease(held(tmp_path / "lease.json", replace(me(), began="1")), me())
    lease.release()


@pytest.mark.parametrize(("job_id", "restart"), [(None, 0), ("7", 0), ("8", 1)])
def test_a_holder_of_this_host_that_runs_keeps_it(tmp_path: Path, job_id: str | None, restart: int) -> None:
    first = held(tmp_path / "lease.json", me("7"))
    kept = first.read_bytes()
    with pytest.raises(ConfigError, match=rf"process {os.getpid()} on {socket.gethostname()} is writing here"):
        Lease(first, me(job_id, restart))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [kept]


@pytest.mark.parametrize(
    ("job_id", "restart", "shows_life", "taken"),
    [
        (None, 0, False, True),  # no heartbeat: gone
        (None, 0, True, False),
        ("8", 1, True, False),  # another job
        ("7", 0, True, False),  # the same attempt twice
        ("7", 1, True, True),  # a later attempt of the same job: the earlier one will leave
        ("7", 1, False, True),
    ],
)
def test_of_another_host_heartbeats_and_attempts_decide(
    tmp_path: Path, job_id: str | None, restart: int, shows_life: bool, taken: bool
) -> None:
    path = held(tmp_path / "lease.json", ELSEWHERE)
    assert ELSEWHERE.alive is None
    asks = me(job_id, restart)
    if shows_life:
        with touched(path):
            if taken:
                lease = Lease(path, asks)
            else:
                with pytest.raises(ConfigError, match="process 1 on another-host is writing here"):
                    Lease(path, asks)
    else:
        lease = Lease(path, asks)
    assert read_holder(path) == (asks if taken else ELSEWHERE)
    if taken:
        lease.release()


def test_an_earlier_attempt_does_not_take_it_from_a_later_one(tmp_path: Path) -> None:
    path = held(tmp_path / "lease.json", replace(ELSEWHERE, restart=2))
    with touched(path), pytest.raises(ConfigError, match="is writing here"):
        Lease(path, me("7", 1))


def test_a_damaged_lease_holds_nobody(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text('{"host": "a')
    lease = Lease(tmp_path / "lease.json", me())
    lease.release()


@pytest.mark.parametrize("differs", [{"boot": "of another machine"}, {"pid_namespace": "1"}])
@pytest.mark.parametrize("began", ["", "1"])  # by its pid it would be gone, or be this process
def test_a_pid_of_another_container_or_boot_is_not_looked_for(
    tmp_path: Path, differs: dict[str, str], began: str
) -> None:
    there = replace(me(), **differs, **({"began": began} if began else {}))
    assert there.alive is None
    path = held(tmp_path / "lease.json", there)
    with touched(path):
        assert holder_is_alive(tmp_path)
        with pytest.raises(
            ConfigError, match=r"in another container or before the machine's last start is writing here"
        ):
            Lease(path, me())
    assert not holder_is_alive(tmp_path)
    Lease(path, me()).release()


def test_a_holder_of_an_earlier_version_is_judged_by_its_pid(tmp_path: Path) -> None:
    old = {key: value for key, value in asdict(me()).items() if key not in ("boot", "pid_namespace")}
    (tmp_path / "lease.json").write_text(json.dumps(old))
    assert holder_is_alive(tmp_path)
    (tmp_path / "lease.json").write_text(json.dumps(old | {"began": "1"}))
    assert not holder_is_alive(tmp_path)


def test_a_process_sends_heartbeats_for_another_that_forks_and_ends_with_it(tmp_path: Path) -> None:
    path = held(tmp_path / "worker-0.json", replace(me(), boot="of another machine"))
    assert not is_alive(path)
    with heartbeats(path):
        assert is_alive(path)
    assert not is_alive(path)


@pytest.mark.parametrize("options", [["--mount-proc"], []])  # with its own /proc, and with the one of outside
def test_a_run_in_another_pid_namespace_keeps_its_folder(tmp_path: Path, options: list[str]) -> None:
    unshare = ["unshare", "--pid", "--fork", *options]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespace can be made here")
    code = (
        "import sys; from pathlib import Path; from apt_launch import lease; lease.INTERVAL = 0.1\n"
        "held = lease.Lease(Path(sys.argv[1]), lease.Holder.this_process())\n"
        "print(lease.holder_is_alive(held.path.parent), flush=True); sys.stdin.read()"
    )
    path = tmp_path / "lease.json"
    command = [*unshare, sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as inside:
        assert inside.stdin is not None
        assert inside.stdout is not None
        assert inside.stdout.readline() == "True\n"
        there = read_holder(path)
        assert there is not None
        assert there.alive is None
        with pytest.raises(ConfigError, match="in another container"):
            Lease(path, me())
        inside.stdin.close()
    lease = Lease(path, me())
    lease.release()
