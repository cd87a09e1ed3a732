"""``apt_launch.run([...])``: a run from Python or a notebook, in this process."""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from apt_launch.allow import allowing
from apt_launch.command_line import make_folder
from apt_launch.config.explain import understood
from apt_launch.config.load import composing, load
from apt_launch.config.run_config import RunConfig
from apt_launch.escapes import escape_logs
from apt_launch.record import Row, read_rows
from apt_launch.runs.alone import alone_in_process
from apt_launch.runs.folder import RunFolder
from apt_model.errors import ConfigError, Interrupted
from apt_model.files import STRICT, from_json, read_json, read_regular, write_atomic


@dataclass(frozen=True)
class _Summary:
    """The schema of what is shown of ``summary.json``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    state: str
    losses: dict[str, float]


@dataclass(frozen=True)
class Run:
    """A run as its folder has it; made anew, it has what came since."""

    folder: Path

    @property
    def rows(self) -> list[Row]:
        """What was logged, a dict a row: ``pandas.DataFrame(run.rows)``."""
        path = RunFolder(self.folder).metrics
        return read_rows(path) if path.exists() else []

    @property
    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds: state, final and best metrics, when modules were enabled and disabled."""
        path, remedy = RunFolder(self.folder).summary, "Resume the run, which writes it anew."
        content = read_json(path, dict[str, Any], remedy=remedy)
        parts = {"state": content.get("state"), "losses": content.get("val/loss", {})}
        from_json(json.dumps(parts), _Summary, where=str(path), remedy=remedy)
        return content

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the steps at which ``metric`` was logged, and its values: ``plt.plot(*run.curve("val/loss"))``."""
        rows = [row for row in self.rows if metric in row]
        return [int(row["step"]) for row in rows], [row[metric] for row in rows]

    def __repr__(self) -> str:
        """Return what came of it, in one line."""
        losses = list(self.summary.get("val/loss", {}).values())
        message = f", val/loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else ""
        here = Path.cwd()
        place = self.folder.relative_to(here) if self.folder.is_relative_to(here) else self.folder
        return f"<run {self.summary['state']}{message}: {place}>"

    def _repr_html_(self) -> str:
        """Show the losses and the curriculum in a notebook."""
        losses = self.summary.get("val/loss", {})
        epochs = "".join(f"<th>{escape(str(epoch))}</th>" for epoch in losses)
        values = "".join(f"<td>{loss:.4f}</td>" for loss in losses.values())
        picture = RunFolder(self.folder).schedule
        drawn = base64.b64encode(read_regular(picture)).decode() if picture.exists() else ""
        return (
            f"<p>{escape(repr(self))}</p><table><tr><th>epoch</th>{epochs}</tr><tr><th>val/loss</th>{values}</tr></table>"
            + (
                f'<img alt="the curriculum" style="max-width: 40rem" src="data:image/png;base64,{drawn}">'
                if drawn
                else ""
            )
        )


def run(overrides: Sequence[str], allow: Sequence[str] = ()) -> Run:
    """Compose, check and train here; see :func:`apt_launch.run`."""
    with alone_in_process(), allowing(allow):
        return _run(overrides)


def _run(overrides: Sequence[str]) -> Run:
    from apt_launch.runs.train import train

    config, folder = _composed(overrides)
    checked = RunFolder(folder).check(config)
    with _as_it_was(), _logging_to(folder):
        (folder / ".hydra").mkdir(exist_ok=True)
        write_atomic(folder / ".hydra" / "overrides.yaml", json.dumps([*overrides]) + "\n")
        try:
            train(config, folder, checked=checked, own_process=False, alone=True)
        except Interrupted as interrupted:
            more = ", ".join(map(repr, RunFolder(folder).resume_overrides(config)))
            raise KeyboardInterrupt(f"{interrupted}. Go on with: apt_launch.run([..., {more}])") from None
        except ConfigError:
            RunFolder(folder).discard()
            raise
    return Run(folder.absolute())


def _composed(overrides: Sequence[str]) -> tuple[RunConfig, Path]:
    """Return the config and the run's folder.

    Raises:
        ConfigError: with every problem found.
    """
    from apt_launch.config.profile_file import with_profile_file

    if isinstance(overrides, str):
        raise ConfigError(f"overrides: {overrides!r} is a string. Give a list: apt_launch.run([{overrides!r}]).")
    flags = [override for override in overrides if override.startswith("-")]
    if flags:
        raise ConfigError(f"{flags[0]}: apt_launch.run makes one run and takes no flags; python -m apt_launch does.")
    try:
        with composing() as compose:
            cfg = compose(with_profile_file([*overrides]))
            return load(cfg), Path(str(cfg.hydra.run.dir))
    except Exception as error:
        message = understood(error)
        if message is None:
            raise
        raise message from None


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Keep the run's files private meanwhile, and leave the process as it was."""
    umask, hook, loudly = os.umask(0o077), threading.excepthook, logging.raiseExceptions
    logging.raiseExceptions = False
    try:
        yield
    finally:
        os.umask(umask)
        threading.excepthook, logging.raiseExceptions = hook, loudly


@contextmanager
def _logging_to(folder: Path) -> Iterator[None]:
    """Log what this package says to standard output and ``train.log`` meanwhile, and nowhere else."""
    from apt_launch.runs.console import Stdout

    make_folder(folder, "hydra.run.dir")
    file = logging.FileHandler(RunFolder(folder).log, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    escape_logs([file])
    loggers = [logging.getLogger(name) for name in ("apt_launch", "apt_model")]
    before = [(logger.level, logger.propagate, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [Stdout(), file], False
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers
        file.close()
