"""``python -m apt_launch``: compose, check, hand over."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING

from apt_launch.command_line import output
from apt_launch.escapes import visible

if TYPE_CHECKING:  # Hydra is loaded where a config is composed, and not to show a page of help
    from omegaconf import DictConfig

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
"""A disk that takes nothing: no mistake of ours, and nothing that a traceback explains."""


def run(cfg: DictConfig) -> float:
    """Train one composed config; return its final validation loss."""
    from hydra.core.hydra_config import HydraConfig

    from apt_launch.config.load import load
    from apt_launch.escapes import escape_logs
    from apt_launch.runs.folder import Checked, RunFolder
    from apt_launch.runs.train import train
    from apt_model.errors import ConfigError

    escape_logs(logging.root.handlers)  # whatever hydra.job_logging has made of them
    path = Path(HydraConfig.get().runtime.output_dir)
    os.chdir(HydraConfig.get().runtime.cwd)  # where relative paths were checked, whatever hydra.job.chdir says
    checked: Checked | None = getattr(
        run, "checked", None
    )  # by CheckBeforeStart, unless a sweeper of Hydra's came here
    try:
        return train(checked.config if checked else load(cfg), path, checked=checked)
    except ConfigError:  # what only torch or the whole text could show
        RunFolder(path).discard()
        raise


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a run failed, 2 config or command line wrong, 130 interrupted."""
    with output():
        _main()


def _main() -> None:
    if answered(sys.argv[1:]):
        return
    if "--dry-run" in sys.argv:
        from apt_launch.preview import __main__ as preview

        preview.main()
        return
    import hydra

    from apt_launch.allow import take_flags
    from apt_launch.commands import flags_first
    from apt_launch.config import guard
    from apt_launch.config.menu import CONF
    from apt_launch.config.profile_file import with_profile_file
    from apt_launch.secrets import keep_private
    from apt_launch.sweep.application import TRAINER, application
    from apt_launch.sweep.plugins import register
    from apt_model.errors import TrainingError

    keep_private()
    logging.raiseExceptions = False  # a log that cannot be written is no reason to fill the terminal
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        sys.argv[1:] = with_profile_file(flags_first(take_flags(sys.argv[1:])))
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on as they are, and we say what they mean
        register()
        decorated = hydra.main(config_path=str(CONF), config_name="config", **guard.main_arguments())
        with guard.installed():
            decorated(application(TRAINER)(run))()
    except TrainingError as error:
        if wants_traceback or error.__cause__ is not None:
            raise
        sys.stderr.write(f"error: {visible(str(error))}\n")
        sys.exit(1)
    except BrokenPipeError:
        raise
    except Exception as error:
        from apt_launch.command_line import mistake, show_error
        from apt_launch.config.explain import understood

        if wants_traceback:
            raise
        if isinstance(error, OSError) and error.errno in DISK:
            sys.stderr.write(f"error: {visible(str(error))}\n")
            sys.exit(1)
        message = understood(error) or (None if _raised_by_the_run(error) else mistake(error))
        if message is None:
            raise
        show_error(message)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _raised_by_the_run(error: Exception) -> bool:
    """Return whether it was the run that failed, and not Hydra on the way to it."""
    return any(frame.f_code is run.__code__ for frame, _ in walk_tb(error.__traceback__))


def answered(arguments: list[str]) -> bool:
    """Answer what needs no config: help, versions, a shell's completion. Return whether it was one of them."""
    if "--help" in arguments or "-h" in arguments:
        from apt_launch.cli.help import show

        show()
    elif "--version" in arguments:
        from apt_launch.config.menu import version

        print(version())
    elif (flag := next((a for a in arguments[:-1] if a in ("-sc", "--shell-completion")), None)) is not None:
        from apt_launch.cli.completion import script

        try:
            print(script(arguments[arguments.index(flag) + 1]))
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)
    else:
        return False
    return True


if __name__ == "__main__":
    main()
