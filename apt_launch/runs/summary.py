"""What came of a run, read from its record: ``summary.json`` and the table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from apt_launch import allow
from apt_launch.commands import command
from apt_launch.config.run_config import RunConfig
from apt_launch.escapes import console
from apt_launch.record import Row
from apt_launch.rows import scheduled_values, stretches
from apt_launch.runs.folder import RunFolder
from apt_model.schedule import MODULES


def summarise(rows: Sequence[Row], modules: Sequence[str] = MODULES) -> dict[str, Any]:
    """Return the first, last and best losses, when modules were enabled and disabled, and the ends that anneals had."""
    train = [row for row in rows if "train/loss" in row]
    val = [row for row in rows if "val/loss" in row]
    on = {
        part: [{"from": _when(one.first), "to": one.off and _when(one.off)} for one in own]
        for part, own in stretches(train).items()
    }
    best = min(val, key=lambda row: row["val/loss"], default=None)
    summary: dict[str, Any] = {
        "final": {name: value for row in (train[-1:] + val[-1:]) for name, value in row.items()},
        "first": train[0] if train else {},
        "best": {name: best[name] for name in ("val/loss", "step", "epoch", "tokens") if name in best} if best else {},
        "val/loss": {int(row["epoch"]): row["val/loss"] for row in val if "epoch" in row},
        "switched_on": {module: on[module][0]["from"] if module in on else None for module in modules},
        "enabled": {module: on.get(module, []) for module in modules},
        "anneals": {},
    }
    for name in sorted({name for row in train for name in scheduled_values(row)}):
        values = [row[f"schedule/{name}"] for row in train if f"schedule/{name}" in row]
        summary["anneals"][name] = {"first": values[0], "last": values[-1]}
    return summary


def _when(row: Row) -> dict[str, float]:
    return {name: row[name] for name in ("epoch", "step")}


def show(summary: dict[str, Any], config: RunConfig, folder: RunFolder) -> None:
    """Print the table at the end of a run."""
    screen = console()
    table = Table(title=f"{summary['state']}: {summary['steps']} of {config.horizon.steps} steps", title_justify="left")
    table.add_column("curriculum")
    table.add_column("from", justify="right")
    table.add_column("to", justify="right")
    for module, times in summary["enabled"].items():
        if not times:
            table.add_row(module, "off", "")
            continue
        last, count = times[-1], len(times)
        until = _at(last["to"]) if last["to"] else "end"
        table.add_row(f"{module} (the last of {count} times)" if count > 1 else module, _at(last["from"]), until)
    for name, ends in summary["anneals"].items():
        table.add_row(name, f"{ends['first']:.4g}", f"{ends['last']:.4g}")
    table.add_section()
    if summary["first"]:
        table.add_row("train/loss", f"{summary['first']['train/loss']:.4f}", f"{summary['final']['train/loss']:.4f}")
    losses = list(summary["val/loss"].values())
    if losses:
        table.add_row("val/loss", f"{losses[0]:.4f}", f"{losses[-1]:.4f}")
    screen.print(table)
    if losses:
        epochs = "  ".join(f"{epoch}: {loss:.4f}" for epoch, loss in summary["val/loss"].items())
        screen.print(f"val/loss by epoch  {epochs}", highlight=False, soft_wrap=True)
    speed = f", {summary['tokens_per_second']:,.0f} tokens/s" if summary.get("tokens_per_second") else ""
    seconds = int(summary["seconds"])
    screen.print(
        f"{summary['final'].get('tokens', 0):,} tokens in {seconds // 60}:{seconds % 60:02d}{speed}",
        highlight=False,
    )
    screen.print(f"run folder  {folder.path}", highlight=False, soft_wrap=True)


def _at(when: Mapping[str, float]) -> str:
    return f"epoch {when['epoch']}, step {when['step']}"


def suggest(folder: RunFolder) -> None:
    """Print what can be done after a run."""
    screen = console(highlight=False)
    screen.print("\nWhat next?", style="bold")
    for text, line in (
        ("text from this model", command("apt_launch.generate", *allow.flags(), folder.path, "--prompt", "def ")),
        ("other curricula, before they run", command("apt_launch.preview", "schedule.route_temp.end=0.6,0.8")),
        ("and which of them is better", command("apt_launch", "--multirun", "schedule.route_temp.end=0.6,0.8")),
    ):
        screen.print(f"  {text}:\n    {line}", soft_wrap=True, markup=False)
