"""``python -m apt_launch.compare RUN RUN ...``: finished or running runs side by side, at equal tokens."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_launch.config.ending import ending
from apt_launch.config.run_config import is_neutral
from apt_launch.drawing import Drawing, new_figure
from apt_launch.escapes import label as plain
from apt_launch.record import Row, read_rows
from apt_launch.secrets import keep_private
from apt_launch.values import changed_keys, flatten, read_frozen
from apt_model.errors import ConfigError


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the command line or a folder is wrong, 130 interrupted."""
    keep_private()
    with ending():
        arguments = parser().parse_args()
        _compare(arguments)


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    found = argparse.ArgumentParser(
        prog="python -m apt_launch.compare",
        description="Losses of several runs at equal tokens, what differs in their configs, and one picture of their curves.",
        epilog="example: python -m apt_launch.compare runs/a runs/b --out compared.png",
        allow_abbrev=False,
    )
    add = found.add_argument
    add("folders", metavar="RUN_DIR", type=Path, nargs="+", help="folders of runs, two or more")
    add("--metric", default="val/loss", metavar="NAME", help="what is compared (val/loss)")
    add("--out", type=Path, default=Path("compared.png"), metavar="FILE", help="the picture (compared.png)")
    add("--json", action="store_true", help="for programs: one JSON object")
    return found


def at_tokens(rows: Sequence[Row], metric: str, tokens: float) -> float | None:
    """Return the last value of ``metric`` that was logged after at most ``tokens`` tokens."""
    values = [row[metric] for row in rows if metric in row and row["tokens"] <= tokens]
    return values[-1] if values else None


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys that are not the same in all flat configs, and decide results, with the value of each config."""
    first = configs[0]
    keys = sorted({key for other in configs[1:] for key in changed_keys(first, other) if not is_neutral(key)})
    return {key: [config.get(key) for config in configs] for key in keys}


def _compare(arguments: argparse.Namespace) -> None:
    folders: list[Path] = arguments.folders
    if len(folders) < 2:
        raise ConfigError("RUN_DIR: one run alone cannot be compared. Name two or more.")
    if not arguments.out.parent.is_dir() or arguments.out.is_dir():
        raise ConfigError(f"--out: {arguments.out} is no place for a picture. Name a file in a folder that is there.")
    runs: list[list[Row]] = []
    for folder in folders:
        if not (folder / "metrics.jsonl").exists():
            raise ConfigError(f"{folder}: there is no run here: no metrics.jsonl (looked in {Path.cwd()}).")
        rows = [row for row in read_rows(folder / "metrics.jsonl") if arguments.metric in row]
        if not rows:
            raise ConfigError(f"--metric: {folder} has no row with {arguments.metric!r}.")
        runs.append(rows)
    common = min(rows[-1]["tokens"] for rows in runs)
    shares = [common * share for share in (0.25, 0.5, 0.75, 1.0)]
    table = [[at_tokens(rows, arguments.metric, tokens) for tokens in shares] for rows in runs]
    differ = differences([flatten(read_frozen(folder / "config.yaml")) for folder in folders])
    names = [str(folder) for folder in folders]
    drawing = Drawing(arguments.out)
    with drawing:
        figure = new_figure(8, 4.5)
        axis = figure.subplots()
        for name, rows in zip(names, runs, strict=True):
            axis.plot([row["tokens"] for row in rows], [row[arguments.metric] for row in rows], label=plain(name))
        axis.axvline(common, color="0.6", linewidth=0.8)
        axis.set_xlabel("tokens")
        axis.set_ylabel(plain(arguments.metric))
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
        figure.savefig(arguments.out, dpi=110)
    if arguments.json:
        found = {
            "metric": arguments.metric,
            "tokens": shares,
            "values": dict(zip(names, table, strict=True)),
            "differences": differ,
        }
        sys.stdout.write(json.dumps(found) + "\n")
        return
    _show(names, shares, table, differ, arguments.metric)
    if not drawing.failed:
        sys.stdout.write(f"picture  {arguments.out}\n")


def _show(
    names: Sequence[str],
    shares: Sequence[float],
    table: Sequence[Sequence[float | None]],
    differ: Mapping[str, Sequence[Any]],
    metric: str,
) -> None:
    from rich.table import Table

    from apt_launch.escapes import console

    screen = console()
    shown = Table(title=f"{metric} at equal tokens", title_justify="left")
    shown.add_column("run")
    for tokens in shares:
        shown.add_column(f"{tokens:,.0f}", justify="right")
    for name, values in zip(names, table, strict=True):
        shown.add_row(name, *("" if value is None else f"{value:.4f}" for value in values))
    screen.print(shown)
    if differ:
        apart = Table(title="what differs", title_justify="left")
        apart.add_column("key")
        for name in names:
            apart.add_column(name)
        for key, given in differ.items():
            apart.add_row(key, *(str(value) for value in given))
        screen.print(apart)


if __name__ == "__main__":
    main()
