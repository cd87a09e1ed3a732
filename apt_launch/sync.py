"""``python -m apt_launch.sync DIR``: deliver to W&B what it has not seen of a run, or of each run of a sweep.

``metrics.jsonl`` is what gets delivered, so it does not matter how often a run was killed, or whether it was offline. Rows
that W&B has are skipped: twice is as good as once. A run that is offline may be delivered while it trains.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from pathlib import Path

from apt_launch.config.ending import ending
from apt_launch.config.instantiate import build
from apt_launch.escapes import visible
from apt_launch.lease import holder_is_alive, read_holder
from apt_launch.secrets import keep_private
from apt_launch.tracking.deliver import Summary, deliver
from apt_launch.values import read_frozen
from apt_model.errors import ConfigError
from apt_model.files import read_json, refuse_links


def main() -> None:
    """Run the command line. Exit codes: 0 all delivered, 1 W&B did not take it, 2 nothing to deliver, 130 interrupted."""
    keep_private()
    with ending():
        folder: Path = parser().parse_args().folder
        runs = runs_in(folder)
        sys.exit(_deliver(runs[0]) if len(runs) == 1 else _deliver_each(runs))


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    found = argparse.ArgumentParser(
        prog="python -m apt_launch.sync",
        description="Deliver to W&B what it has not seen of a run, or of each run of a sweep. Rows that W&B has are "
        "skipped: twice is as good as once.",
        epilog="It needs a key of W&B: run wandb login first, or set WANDB_API_KEY. Only "
        "runs with logger=wandb can be delivered.",
        allow_abbrev=False,
    )
    found.add_argument(
        "folder", metavar="DIR", type=Path, help="a run's folder, or a sweep's; it may still be training"
    )
    return found


def runs_in(folder: Path) -> list[Path]:
    """Return the folders of the runs in ``folder``: itself, or those of a sweep's jobs.

    Raises:
        ConfigError: there are none.
    """
    if (folder / "metrics.jsonl").exists():
        return [folder]
    runs = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    if not runs:
        raise ConfigError(f"{folder}: there is no run here: no metrics.jsonl (looked in {Path.cwd()}).")
    return runs


def _deliver_each(runs: list[Path]) -> int:
    """Deliver each run in a process of its own: W&B's client keeps one run a process."""
    codes = [
        subprocess.run([sys.executable, "-m", "apt_launch.sync", str(run)], check=False).returncode for run in runs
    ]
    return max(codes)


def _deliver(folder: Path) -> int:
    import wandb

    refuse_links(folder, "DIR")
    values = read_frozen(folder / "config.yaml")
    try:
        state = read_json(folder / "summary.json", Summary, remedy="Resume the run, which writes it anew.").state
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: {error}") from None
    holder = read_holder(folder / "lease.json")
    if not isinstance(values.get("logger"), dict):
        raise ConfigError(f"{folder / 'config.yaml'}: damaged: its logger is missing.")
    if holder is not None and values["logger"].get("mode") == "online" and holder_is_alive(folder):
        raise ConfigError(f"{folder}: process {holder.pid} on {holder.where} is training here, and delivers by itself.")
    try:
        online = {**values["logger"], "mode": "online"}
        make = functools.partial(build, online, folder=folder, config=values, fallback=False)
        sent, before = deliver(make, folder, state)
    except (wandb.Error, TimeoutError) as error:
        reason = visible(str(error).strip().rstrip("."))
        sys.stderr.write(f"error: {folder}: W&B: {reason}. Nothing is lost; try again later.\n")
        return 1
    sys.stdout.write(f"{folder}: {sent} rows sent, {before} were there\n")
    return 0


if __name__ == "__main__":
    main()
