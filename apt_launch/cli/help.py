"""``python -m apt_launch --help``: groups, common keys and examples. Neither torch nor Hydra is loaded for it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from apt_launch.config.menu import ADDED, COMMANDS, Group, groups, keys
from apt_launch.version import __version__

EXAMPLES: Final = (
    (
        "See curricula before they run, laid over each other:",
        "python -m apt_launch.preview schedule.route_temp.end=0.6,0.8",
    ),
    (
        "Train through the whole curriculum, two to three minutes on two cores:",
        "python -m apt_launch schedule=gpt5_moe",
    ),
    ("Ctrl-C writes a checkpoint ...", "python -m apt_launch hydra.run.dir=runs/a"),
    ("... and this continues from it, exactly:", "python -m apt_launch hydra.run.dir=runs/a trainer.resume=auto"),
    (
        "Sweep on this machine (--dry-run shows the plan and starts nothing):",
        "python -m apt_launch --multirun schedule.route_temp.end=0.6,0.8 seed=0,1,2",
    ),
    (
        "Sweep on a SLURM cluster; the command returns once sbatch has answered:",
        "python -m apt_launch --multirun hydra/launcher=slurm launch.hours=8 +sweeps=route_temp",
    ),
    ("How far it is, and which job won:", "python -m apt_launch.sweep status DIR"),
    ("", "python -m apt_launch.sweep report DIR"),
    ("Text from what was trained:", "python -m apt_launch.generate runs/a --prompt 'def '"),
)

COMMON: Final = {
    "schedule.route_temp.end": "the router's temperature at the end; also start, by, type, warmup",
    "schedule.enable_moe_at_epoch": "when experts are enabled (null: never); also align, voter",
    "trainer.max_epochs": "length of the run",
    "trainer.max_batches_per_epoch": "null: all that the text gives",
    "trainer.batch_size": "sequences of model.seq_len tokens",
    "optimizer.lr": "the learning rate's peak; its shape: trainer.lr_schedule",
    "model.d_model": "width; also num_layers, num_heads, d_ff, seq_len",
    "moe.num_experts": "experts a layer; top_k of them for each token",
    "trainer.device": "auto: CUDA where there is a device",
    "trainer.resume": "auto: continue from the newest checkpoint in the run's folder",
    "logger.mode": "offline, online (needs a key of W&B), disabled",
    "hydra.run.dir": "the run's folder",
    "seed": "of weights, batches, dropout, votes; not of the split: data.seed",
}
"""The keys that most runs begin with, and what there is to know of them."""

FLAGS: Final = {
    "--multirun, -m": "sweep: a key may have several values, a=1,2",
    "--dry-run": "show the curriculum, or the plan of a sweep, and start nothing",
    "--cfg job": "show the config with every key (--resolve: with values put in), and run nothing",
    "--info defaults": "show which files the config comes from",
    "--config-dir DIR": "a folder of your own groups and options",
    "--allow PACKAGE": "the config may name classes that this package of yours defines",
    "-sc install=SHELL": "print what completes these commands in bash, zsh or fish",
    "--hydra-help": "Hydra's other flags",
    "--version": "versions of this, torch and Python",
}

MORE: Final = (
    "Every key with its default and meaning: conf/, one file a choice. Guides: README.md and docs/.",
    "A mistake in the config is reported before anything starts, with the nearest valid names.",
    "Exit codes: 0 done, 1 a run failed, 2 the config or the command line is wrong, 130 interrupted.",
)

LESS_COMMON: Final = ("hydra/job_logging",)


def show() -> None:
    """Print the help, as wide as the terminal is."""
    console = Console(highlight=False)
    with console.capture() as shown:
        _print(console)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in shown.get().splitlines()))


def _print(console: Console) -> None:

    def heading(text: str) -> None:
        console.print(Text(f"\n{text}", style="bold"))

    def listed(rows: Iterable[Sequence[str]]) -> None:
        table = Table.grid(padding=(0, 2))
        for name, *others in rows:
            table.add_row(Text(f"  {name}"), *map(Text, others))
        table.columns[0].no_wrap = console.width >= 60
        for column in table.columns:
            column.overflow = "fold"
        console.print(table)

    def purpose_of(group: Group) -> Sequence[str]:
        options = ", ".join(f"{option}*" if option == group.default else option for option in group.options)
        return (group.purpose, options) if console.width >= 76 else (f"{group.purpose}\n{options}",)

    console.print(
        Text(
            f"apt-launch {__version__}. Trains a mixture-of-experts language model through a curriculum: when "
            "modules switch on, how values anneal. Here, as a sweep, or on a SLURM cluster. "
            "The default run needs no account, no download and no GPU."
        )
    )
    heading("Usage")
    console.print(Text("  python -m apt_launch [FLAG ...] [GROUP=OPTION ...] [KEY=VALUE ...]\n  apt-launch: the same"))
    heading("Examples")
    for text, command in EXAMPLES:
        if text:
            console.print(Text(f"  {text}", style="dim"))
        console.print(Text(f"    {command}", style="cyan"), soft_wrap=True)
    heading("Groups: GROUP=OPTION (*: the default)")
    listed(
        (f"+{name}" if name in ADDED else name, *purpose_of(group))
        for name, group in groups().items()
        if name not in LESS_COMMON
    )
    heading("Common keys: KEY=VALUE (with the value they have)")
    known = keys()
    listed((f"{key}={value if len(value := known[key].value) < 12 else '...'}", text) for key, text in COMMON.items())
    heading("Flags")
    listed(FLAGS.items())
    heading("Other commands (each has --help)")
    listed((f"python -m {module}", text) for module, text in COMMANDS.items())
    heading("More")
    for sentence in MORE:
        console.print(Padding(Text(sentence), (0, 0, 0, 2)))
