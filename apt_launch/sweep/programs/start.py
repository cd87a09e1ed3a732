"""Starts a user's program again in a job's process, as by hand, and gives its function the frozen config.

The program is run as ``__main__`` with a command line that has Hydra choose the sweeper :data:`SWEEPER`. That one gets the
function, the callbacks' context and the rest from Hydra itself, so nothing of Hydra or of the program is patched, and runs
:func:`hydra.core.utils.run_job` as Hydra's own launcher does.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apt_launch.sweep.application import Program
from apt_launch.sweep.programs.freeze import thaw
from apt_launch.sweep.programs.output_folder import Entry, asked_by_interpolations
from apt_model.errors import ConfigError, ReportedError, cause_of

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction

CONF: Final = Path(__file__).parent / "conf"
SWEEPER: Final = "apt_job"


@dataclass
class Call:
    """A job's call of a program's function, and what came of it."""

    values: Mapping[str, Any]
    folder: Path
    number: int
    job_id: str
    overrides: Sequence[str]
    on_output: Callable[[Path], None] = lambda output: None  # called with the folder that Hydra has made for the job
    called: bool = False
    returned: Any = None
    error: BaseException | None = field(default=None, repr=False)

    def perform(self, context: HydraContext, task: TaskFunction) -> None:
        """Call the function with the frozen config, as Hydra's launchers do."""
        from hydra._internal.callbacks import Callbacks
        from hydra.core.utils import JobStatus, run_job, setup_globals
        from hydra.types import HydraContext
        from omegaconf import open_dict

        self.called = True
        setup_globals()
        sys.argv[1:] = list(self.overrides)
        cfg = thaw(self.values)
        with open_dict(cfg):
            cfg.hydra.job.id = self.job_id
            cfg.hydra.job.num = self.number
        more = {"execution_whitelist": context.execution_whitelist} if hasattr(context, "execution_whitelist") else {}
        with asked_by_interpolations(cfg):  # as in a single run
            callbacks = Callbacks(cfg)
        callbacks.callbacks.insert(0, Entry(self.on_output))
        done = run_job(
            hydra_context=HydraContext(config_loader=context.config_loader, callbacks=callbacks, **more),
            task_function=task,
            config=cfg,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        if done.status is JobStatus.COMPLETED:
            self.returned = done.return_value
        else:
            self.error = done._return_value
            _ = done.return_value  # raises what the function raised: Hydra shows it as by hand


_pending: list[Call] = []
"""The call of this process, until the program has come to it."""


def take() -> Call:
    """Return the call that this process is for.

    Raises:
        ConfigError: it is for none.
    """
    if not _pending:
        raise ConfigError(
            f"hydra/sweeper: {SWEEPER} is what jobs of a sweep use inside. Choose hydra/sweeper=apt, and "
            "hydra/launcher=apt_local or apt_slurm."
        )
    return _pending.pop()


def start(program: Program, call: Call, mapped: Mapping[str, str]) -> None:
    """Run ``program`` until its function has been called, and to its end.

    Args:
        mapped: folders, and those that stand in for them: of a snapshot.

    Raises:
        ReportedError: the function raised; the log has the traceback.
        ConfigError: the function was not called.
    """
    _pending[:] = [call]
    cwd = Path.cwd()
    flags = ["--config-path", str(CONF), "--config-name", "apt_job", "--multirun", f"hydra/sweeper={SWEEPER}"]
    flags += [f"hydra.sweep.dir={_quoted(call.folder)}"]  # of the composing alone; nothing is written there by it
    first = str(Path(program.script).parent) if program.script is not None else str(cwd)
    sys.path[:] = _path([first, *sys.path[1:]], mapped)
    sys.path_importer_cache.clear()
    try:
        if program.script is not None:
            script = _mapped(program.script, mapped)
            sys.argv[:] = [script, *flags]
            if not Path(script).is_file():
                raise ConfigError(f"{script}: the program is not there any more. Put it back, or start a new sweep.")
            runpy.run_path(script, run_name="__main__")
        elif program.function is None:
            sys.argv[:] = [str(program.module), *flags]
            runpy.run_module(str(program.module), run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = ["-c", *flags]
            _function(program)()
    except SystemExit as leaving:
        if call.error is None and (leaving.code not in (None, 0) or not call.called):
            what = "it was left" if call.called else "the program was left before it called its function,"
            raise ReportedError(f"{what} with exit code {leaving.code}") from None
    except Exception as error:
        if call.error is None:
            if isinstance(error, ConfigError):
                raise
            import traceback

            traceback.print_exc()
            raise ReportedError(cause_of(error)) from None
    if call.error is not None:
        raise ReportedError(cause_of(call.error)) from None
    if not call.called:
        raise ConfigError(
            f"{' '.join(program.command)}: it did not call its function of hydra.main when it was started again. Call it "
            "whenever the program is started so."
        )


def program_of(task: Any, **more: Any) -> Program:
    """Return how to start the program again that has called ``task``, its function of ``hydra.main``.

    Raises:
        ConfigError: it has neither a file nor a module.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = getattr(main, "__file__", None)
    if spec is not None and spec.name != "__main__":
        return Program(module=spec.name.removesuffix(".__main__"), **more)
    if name is not None and Path(name).is_file():
        return Program(script=str(Path(name).absolute()), **more)
    module, function = getattr(task, "__module__", "__main__"), getattr(task, "__qualname__", "<locals>")
    if module != "__main__" and "<" not in function:
        return Program(module=module, function=function, **more)
    raise ConfigError(
        f"hydra/sweeper: {module}.{function} has neither a file nor a module, and jobs could not find it again. Put it into a "
        "file, and start that by python FILE or python -m MODULE."
    )


def _function(program: Program) -> Any:
    import importlib

    found: Any = importlib.import_module(str(program.module))
    for part in str(program.function).split("."):
        found = getattr(found, part)
    return found


def _mapped(name: str, mapped: Mapping[str, str]) -> str:
    for folder, copy in mapped.items():
        if name == folder or name.startswith(folder + os.sep):
            return copy + name[len(folder) :]
    return name


def _path(names: Sequence[str], mapped: Mapping[str, str]) -> list[str]:
    """Return ``names`` with copies instead of what was copied; what is not in a copy is found behind it."""
    found = []
    for name in names:
        absolute = str(Path(name).absolute()) if name else str(Path.cwd())
        copy = _mapped(absolute, mapped)
        found += [copy] if copy != absolute and Path(copy).exists() else [name]
    return found


def _quoted(path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
