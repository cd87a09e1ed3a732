"""Where a job of a program writes: Hydra's output folder, as Hydra makes it of the frozen config, wherever the sweep lies now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from apt_launch.interpolations import bounded
from apt_launch.sweep.programs.freeze import TYPES, thaw
from apt_launch.values import from_yaml
from apt_model.errors import ConfigError
from apt_model.files import STRICT, read_json, read_regular, write_json

OUTPUT: Final = "output.json"
MOST_BYTES: Final = 1 << 28
"""Of a plan."""


@dataclass(frozen=True)
class _Kept:
    """The schema of ``output.json``: the job's output folder, relative to the sweep's if it lies there."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    output: str


class Entry:
    """A callback of Hydra's that hands over the output folder before the program's own callbacks are called."""

    def __init__(self, on_output: Callable[[Path], None]) -> None:
        self._on_output = on_output

    def on_job_start(self, config: Any, **more: Any) -> None:
        """Take the folder that Hydra has made."""
        self._on_output(Path(str(config.hydra.runtime.output_dir)))

    def on_job_end(self, **more: Any) -> None:
        """Do nothing."""


def keep(folder: Path, output: Path) -> None:
    """Write down in the job's own ``folder`` where it writes: not every interpolation has a value without the program."""
    sweep = folder.parent
    write_json(folder / OUTPUT, {"output": str(output.relative_to(sweep) if output.is_relative_to(sweep) else output)})


def kept(folder: Path) -> Path | None:
    """Return where the job in ``folder`` has written, though the sweep was moved since; None: nobody knows."""
    with suppress(ConfigError, FileNotFoundError):
        return folder.parent / read_json(folder / OUTPUT, _Kept, remedy="Remove it.").output
    return None


def at(values: Mapping[str, Any], sweep: Path) -> Mapping[str, Any]:
    """Return a job's frozen values for a sweep that lies in the folder ``sweep`` now, and may have been moved there.

    A ``hydra.sweep.dir`` that is the same for all jobs is the sweep's folder; jobs for which it differs keep theirs.
    """
    planned = values["hydra"]["sweep"]["dir"]
    if Path(str(planned)).absolute() == sweep or _shared_dir(sweep) != planned:
        return values
    here = str(sweep).replace("${", "\\${")
    return {**values, "hydra": {**values["hydra"], "sweep": {**values["hydra"]["sweep"], "dir": here}}}


def _shared_dir(sweep: Path) -> object:
    with suppress(ConfigError, OSError, ValueError, LookupError, TypeError, RecursionError):
        plan = from_yaml(read_regular(sweep / "plan.yaml", MOST_BYTES).decode("utf-8"))
        return plan["shared"]["hydra"]["sweep"]["dir"]
    return None


def expected(values: Mapping[str, Any], number: int, job_id: str) -> Path | None:
    """Return the output folder that Hydra will give to a job; None: the config asks for what only the program knows."""
    whole = {key: value for key, value in values.items() if key != TYPES}  # classes are the program's
    hydra = values["hydra"]
    least = {"hydra": {"sweep": hydra["sweep"], "job": {}}}  # the rest may have a value that only the program can make
    for part in (whole, least):
        with suppress(Exception):  # whatever a resolver raises, or is not there
            return _resolved(part, number, job_id)
    return None


def _resolved(values: Mapping[str, Any], number: int, job_id: str) -> Path:
    from hydra.core.utils import setup_globals
    from omegaconf import OmegaConf, open_dict

    cfg = thaw(values)
    with open_dict(cfg):
        cfg.hydra.job.num, cfg.hydra.job.id = number, job_id
    setup_globals()
    with asked_by_interpolations(cfg), bounded():
        return Path(*(str(OmegaConf.select(cfg, f"hydra.sweep.{key}")) for key in ("dir", "subdir"))).absolute()


@contextmanager
def asked_by_interpolations(cfg: Any) -> Iterator[None]:
    """Have ``${hydra:...}`` be answered from ``cfg`` meanwhile."""
    from hydra.core.hydra_config import HydraConfig

    before = HydraConfig.instance().cfg
    HydraConfig.instance().cfg = cfg
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
