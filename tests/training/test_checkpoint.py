from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch

from apt_model.errors import CheckpointError
from apt_model.training.checkpoint import Checkpoints, load, newest_intact, read_manifest


def test_what_is_loaded_is_what_was_saved_and_the_manifest_tells_of_the_run(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", about={"identity": "abc"})
    state = {"w": torch.randn(3), "clock": {"step": 7}}
    path = checkpoints.save(state, step=7, rows=4)
    assert path == tmp_path / "c" / "step-00000007"
    loaded = load(path)
    assert torch.equal(loaded["w"], state["w"])
    assert loaded["clock"] == {"step": 7}
    manifest = read_manifest(path)
    assert (manifest["step"], manifest["rows"], manifest["about"]) == (7, 4, {"identity": "abc"})


def test_only_the_last_ones_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 10, 11):
        checkpoints.save({"step": step}, step=step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


def test_the_same_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"value": 1}, step=3)
    path = checkpoints.save({"value": 2}, step=3)
    assert load(path) == {"value": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_told_and_passed_over(tmp_path: Path, damage: str) -> None:
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
