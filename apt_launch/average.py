"""``python -m apt_launch.average RUN --last N``: the mean of the weights of a run's newest checkpoints, as a run of its own.

The folder that it writes has one checkpoint, with a manifest like any other's, for ``generate``, ``evaluate`` and
``trainer.init_from``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from apt_launch.command_line import say_passed_over
from apt_launch.config.ending import ending
from apt_launch.secrets import keep_private
from apt_model.errors import CheckpointError, ConfigError
from apt_model.files import refuse_links, refuse_place
from apt_model.training.checkpoint import Checkpoints, read_manifest
from apt_model.training.saved_state import read_state


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the command line or the folder is wrong, 130 interrupted."""
    keep_private()
    with ending():
        arguments = parser().parse_args()
        path = average(arguments.folder, arguments.last, arguments.to or arguments.folder / "average")
        sys.stdout.write(f"{path}\n")


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    found = argparse.ArgumentParser(
        prog="python -m apt_launch.average",
        description="Write the mean of the weights of a run's newest checkpoints, as a folder that generate, evaluate and "
        "trainer.init_from take. More checkpoints stay with trainer.keep_last.",
        epilog="example: python -m apt_launch.average runs/a --last 5",
        allow_abbrev=False,
    )
    found.add_argument("folder", metavar="RUN_DIR", type=Path, help="the run's folder")
    found.add_argument("--last", type=int, default=5, metavar="N", help="how many checkpoints (5)")
    found.add_argument("--to", type=Path, metavar="DIR", help="a folder that is not there yet; RUN_DIR/average")
    return found


def average(run: Path, last: int, folder: Path) -> Path:
    """Write the mean of the weights of the ``last`` whole checkpoints of ``run`` to ``folder``; return the new checkpoint.

    Raises:
        ConfigError: there are fewer, they are of different phases of the curriculum, or the folder is taken.
    """

    refuse_place(folder, "--to")
    if folder.exists():
        raise ConfigError(f"--to: {folder} is there already. Name another folder, or remove it.")
    whole = []
    for path in reversed(Checkpoints(run / "checkpoints").all()):
        try:
            read_manifest(path)
        except CheckpointError as error:
            say_passed_over([str(error)])
        else:
            whole.append(path)
    if not whole:
        raise ConfigError(f"RUN: {run} has no whole checkpoint. Name the folder of a run that has been trained.")
    if last < 1 or len(whole) < last:
        raise ConfigError(f"--last = {last}: {run} has {len(whole)} whole checkpoints. Give 1 to {len(whole)}.")
    newest, *older = whole[:last]
    state = read_state(newest)
    weights = {
        name: value.double() if value.is_floating_point() else value.clone() for name, value in state["model"].items()
    }
    for path in older:
        others = read_state(path)["model"]
        if {name: value.shape for name, value in others.items()} != {
            name: value.shape for name, value in weights.items()
        }:
            raise ConfigError(
                f"--last = {last}: {path.name} has other modules enabled than {newest.name}, and their weights have no mean. "
                f"Give --last {whole.index(path)} or less."
            )
        for name, value in weights.items():
            if value.is_floating_point():
                value += others[name].double()
    state["model"] = {
        name: (value / last).to(state["model"][name].dtype) if value.is_floating_point() else value
        for name, value in weights.items()
    }
    del weights
    manifest = read_manifest(newest)
    folder.mkdir(parents=True)
    refuse_links(folder, "--to")
    for name in ("config.yaml", "tokenizer.json"):
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    about = {**manifest["about"], "averaged": [path.name for path in reversed(whole[:last])]}
    return Checkpoints(folder / "checkpoints", about=about).save(
        state, step=manifest["step"], epochs=manifest.get("epochs")
    )


if __name__ == "__main__":
    main()
