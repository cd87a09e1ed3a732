from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from apt_model.errors import CheckpointError
from apt_model.training.checkpoint import Checkpoints, load, newest_intact, read_manifest
from tests.forks import HANGS


def test_what_is_loaded_is_what_was_saved_and_the_manifest_reports_the_run(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", about={"identity": "abc"})
    state = {"w": torch.randn(3), "clock": {"step": 7}}
    path = checkpoints.save(state, step=7, rows=4)
    assert path == tmp_path / "c" / "step-00000007"
    loaded = load(path)
    assert torch.equal(loaded["w"], state["w"])
    assert loaded["clock"] == {"step": 7}
    manifest = read_manifest(path)
    assert (manifest["step"], manifest["rows"], manifest["about"]) == (7, 4, {"identity": "abc"})


def test_the_weights_are_a_file_of_safetensors(tmp_path: Path) -> None:
    weights = {"a": torch.randn(3, 2), "b": torch.tensor(1.5)}
    path = Checkpoints(tmp_path).save({"model": weights, "x": 1}, step=1)
    read = safetensors.torch.load_file(path / "model.safetensors")
    assert set(read) == {"a", "b"}
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    assert "model" in load(path)
    assert all(torch.equal(load(path)["model"][name], weights[name]) for name in weights)


def test_only_the_last_ones_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 10, 11):
        checkpoints.save({"step": step}, step=step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


def test_the_best_ones_and_each_so_many_epochs_stay_as_well(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=2, keep_every=3)
    for epoch, loss in enumerate((5.0, 2.0, 4.0, 1.0, 3.0, 6.0, 7.0, 8.0), start=1):
        checkpoints.save({"epoch": epoch}, step=10 * epoch, epochs=epoch, loss=loss)
        checkpoints.save({"epoch": epoch}, step=10 * epoch + 5, epochs=None, loss=None)  # in the middle of the next one
    # best: epochs 4 and 2; every third: 3 and 6; last: the one in the middle of the ninth
    assert [path.name[-2:] for path in checkpoints.all()] == ["20", "30", "40", "60", "85"]


def test_what_is_written_in_the_background_is_the_state_of_when_it_was_asked_for(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    writes = threading.Event()
    checkpoints.before = lambda: (writes.wait(HANGS), None)[1]
    weights = torch.zeros(1000)
    path = checkpoints.save({"model": {"w": weights}, "more": [weights]}, step=1, wait=False)
    weights += 1
    assert checkpoints.all() == []
    writes.set()
    checkpoints.wait()
    assert load(path)["model"]["w"].abs().sum() == 0
    assert load(path)["more"][0].abs().sum() == 0


def test_a_kill_before_any_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Children save over what is there and kill themselves before their nth file operation, for every n."""
    program = f"""
import json, os, signal, sys
from pathlib import Path
import torch, safetensors.torch
from apt_model.training.checkpoint import Checkpoints, load, newest_intact

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.scandir")
torch.save({{}}, {str(tmp_path / "warm.pt")!r})

def attempt(folder, step, limit):
    pid = os.fork()
    if pid == 0:
        counted = 0
        def hook(event, arguments):
            nonlocal counted
            if event in OPERATIONS and ".step-" in str(arguments) or "step-" in str(arguments[:1]):
                counted += 1
                if counted == limit:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        Checkpoints(folder, keep_last=1).save({{"model": {{"w": torch.full((50,), 2.0)}}, "step": step}}, step=step)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

told = []
for step in (1, 2):  # over the same step, and a new one
    for limit in range(1, 200):
        folder = Path({str(tmp_path)!r}) / f"c{{step}}-{{limit}}"
        Checkpoints(folder).save({{"model": {{"w": torch.full((50,), 1.0)}}, "step": 1}}, step=1)
        code = attempt(folder, step, limit)
        path, _ = newest_intact(folder)
        found = load(path)
        values = set(found["model"]["w"].tolist())
        assert values in ({{1.0}}, {{2.0}}), values
        assert (values == {{2.0}}) or found["step"] == 1
        if code == 0:
            assert values == {{2.0}}
            break
        assert code == -signal.SIGKILL
        again = Checkpoints(folder, keep_last=1)
        again.save({{"model": {{"w": torch.full((50,), 3.0)}}, "step": 3}}, step=3)
        assert [p.name for p in folder.iterdir()] == ["step-00000003"], list(folder.iterdir())
    told.append(limit - 1)
print(json.dumps(told))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANGS)
    assert told.returncode == 0, told.stderr
    kills = json.loads(told.stdout)
    assert all(number >= 12 for number in kills), kills  # mkdir, opens, syncs, renames


def test_a_full_disk_costs_a_checkpoint_and_no_training(tmp_path: Path) -> None:
    """A limit on the size of files is a full disk that needs no privilege."""
    program = f"""
import resource, sys
from pathlib import Path
import torch
from apt_model.errors import CheckpointError
from apt_model.training.checkpoint import Checkpoints, newest_intact
checkpoints = Checkpoints(Path({str(tmp_path)!r}))
checkpoints.save({{"w": torch.zeros(10)}}, step=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
for state in ({{"w": torch.zeros(100_000)}}, {{"model": {{"w": torch.zeros(100_000)}}}}):
    checkpoints.save(state, step=2, wait=False)
    checkpoints.wait()
    try:
        checkpoints.save(state, step=2)
        sys.exit("no error")
    except CheckpointError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert newest_intact(Path({str(tmp_path)!r}))[0].name == "step-00000001"
checkpoints.save({{"w": torch.zeros(100_000)}}, step=3)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANGS)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("the checkpoint of step 2 could not be written") == 2
    assert told.stderr.count("Training goes on without it. The newest one is step-00000001.") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_the_same_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"value": 1}, step=3)
    path = checkpoints.save({"value": 2}, step=3)
    assert load(path) == {"value": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_reported_and_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    good = checkpoints.save({"w": torch.zeros(100)}, step=1)
    bad = checkpoints.save({"w": torch.ones(100)}, step=2)
    state, manifest = bad / "state.pt", bad / "manifest.json"
    content = bytearray(state.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "cut":
        state.write_bytes(content[:-1])
    elif damage == "remove":
        state.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.unlink()
    with pytest.raises(CheckpointError, match="step-00000002"):
        load(bad)
    found, passed_over = newest_intact(tmp_path)
    assert found == good
    assert len(passed_over) == 1
    assert "step-00000002" in passed_over[0]


def test_what_was_cut_off_while_writing_is_no_checkpoint(tmp_path: Path) -> None:
    aside = tmp_path / ".step-00000005.tmp"
    aside.mkdir()
    (aside / "state.pt").write_bytes(b"half")
    assert newest_intact(tmp_path) == (None, [])
    Checkpoints(tmp_path).save({"step": 5}, step=5)
    assert newest_intact(tmp_path)[0] == tmp_path / "step-00000005"


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    path = Checkpoints(tmp_path / "c").save({"x": 1}, step=1)
    (path / "state.pt").write_bytes(pickle.dumps(Hostile(), protocol=2))
    content = (path / "state.pt").read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="something else than tensors"):
        load(path)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_named_and_nothing_else_is_lost(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="step 3 could not be written"):
        Checkpoints(tmp_path / "c").save({"x": 1}, step=3)
    assert (tmp_path / "c").read_text() == "a file where the folder should be"
