"""``python -m apt_launch.preview [overrides]``: the curriculum before anything runs.

The timeline and the curves come from the very functions that training calls. An override with several values, such as
``schedule.route_temp.end=0.6,0.8``, lays the curricula over each other. Torch is loaded only for ``--sizes``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apt_launch.allow import take_flags
from apt_launch.command_line import parsed
from apt_launch.config.ending import ending
from apt_launch.preview.painter import Painter

if TYPE_CHECKING:
    from apt_launch.sweep.plan.jobs import Job


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 config or command line wrong, 130 interrupted."""
    with ending():
        sys.argv[1:] = take_flags(sys.argv[1:])
        arguments, overrides = parsed(parser())
        painter = Painter()  # first of all: it loads its library while this process loads Hydra
        try:
            _preview(arguments, overrides, painter)
        finally:
            painter.close()


def _preview(arguments: argparse.Namespace, overrides: list[str], painter: Painter) -> None:
    from apt_launch.config.profile_file import with_profile_file
    from apt_launch.config.schedule_plot import sheets
    from apt_launch.escapes import console
    from apt_launch.planning import gather
    from apt_launch.preview.page import page
    from apt_launch.preview.terminal import MOST_OVERLAID, config_of, moves, show
    from apt_model.files import refuse_place, write_atomic

    plan = gather(with_profile_file(overrides), arguments.config_dir, multirun=arguments.multirun)
    jobs = plan.jobs[:MOST_OVERLAID]
    folder: Path = arguments.out
    refuse_place(folder, "--out")
    tables = _size_tables(jobs, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    programs = {job.label if len(jobs) > 1 else "": config_of(job).program for job in jobs}
    rates = {label: config_of(job).course.lr for label, job in zip(programs, jobs, strict=False) if moves(job)}
    painter.draw(sheets(programs, rates), folder / "preview.png")
    show(plan, console())
    write_atomic(folder / "preview.html", page(programs, plan, rates))
    painter.wait()
    for label, table in tables:
        console().print(*([f"\n{label}"] if label else []), table)
    console().print(f"pictures  {folder}/preview.png  {folder}/preview.html", highlight=False, soft_wrap=True)


def _size_tables(jobs: Sequence[Job], arguments: argparse.Namespace) -> list[tuple[str, object]]:
    """Return a table of sizes for each job, where they are asked for.

    Raises:
        ConfigError: a kind or number of GPUs that means nothing.
    """
    if not (arguments.sizes or arguments.gpu is not None or arguments.gpus is not None):
        return []
    from apt_launch.config.gpus import table
    from apt_launch.config.sizes import sizes
    from apt_launch.preview.terminal import config_of

    num_gpus = 1 if arguments.gpus is None else arguments.gpus
    return [
        (job.label, table(sizes(config_of(job)), config_of(job), gpu=arguments.gpu, num_gpus=num_gpus)) for job in jobs
    ]


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m apt_launch.preview",
        usage="%(prog)s [OPTION ...] [OVERRIDE ...]",
        description="""\
Show a curriculum before it runs: its timeline and its curves, here and as
pictures. Overrides are those of python -m apt_launch; several values of a key
(a=1,2) lay the curricula over each other. Nothing is trained or sent.""",
        epilog="""\
examples:
  python -m apt_launch.preview schedule.route_temp.end=0.6,0.8
  python -m apt_launch.preview schedule.enable_moe_at_epoch=1 trainer.max_epochs=20
  python -m apt_launch.preview --sizes --gpu h100 --gpus 8 model.d_model=1024""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("outputs/preview"), metavar="DIR", help="of the pictures (outputs/preview)")
    add("--sizes", action="store_true", help="show parameters, memory and FLOPs, too (loads torch)")
    add("--gpu", metavar="KIND", help="sizes, with hours and what fits on a kind of GPU: a100, h100, ...")
    add("--gpus", type=int, metavar="N", help="sizes, with what each of N GPUs needs that share the model")
    add("--config-dir", "-cd", type=Path, metavar="DIR", help="a folder of your own groups and options")
    add("--allow", metavar="PACKAGE", help="a package of yours whose classes the config may name")
    add("--multirun", "-m", action="store_true", help="refuse what a sweep refuses; several values always expand")
    add("--dry-run", action="store_true", help="taken for granted")
    return parser


if __name__ == "__main__":
    main()
