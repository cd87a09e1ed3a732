"""Every error that this project raises on purpose.

AptError
├── ConfigError          the config, the command line or an input file is wrong; nothing was run (exit 2)
└── TrainingError        a run that had started cannot continue (exit 1)
    ├── NonFiniteError   the loss or a gradient is not a finite number
    ├── CallbackError    a callback raised
    ├── HorizonError     the updates counted do not fit the updates planned
    ├── ReportedError    a user's program failed, and its log says how
    └── CheckpointError  a checkpoint is missing, damaged or belongs to another run

Interrupted is no error: the run stopped because it was asked to, and it can be resumed (exit 130).
"""

from __future__ import annotations

import difflib
import re
import signal
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    Model = TypeVar("Model", bound=BaseModel)


LONGEST_LIST = 24
"""Above this many valid names only those of the top level are named."""


class AptError(Exception):
    """Base of all errors raised on purpose; its text is fit for a user's eyes."""


class ConfigError(AptError):
    """What is wrong with the input, one problem a line: full key, reason, remedy."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class TrainingError(AptError):
    """A run that had started cannot continue."""


class NonFiniteError(TrainingError):
    """The loss or a gradient is not a finite number."""


class CallbackError(TrainingError):
    """A callback raised; the cause is chained."""


class HorizonError(TrainingError):
    """The updates counted do not fit the updates planned."""


class ReportedError(TrainingError):
    """A user's program failed, and has written its own traceback."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, damaged or belongs to another run."""


class Interrupted(KeyboardInterrupt):
    """The run stopped on request, after its checkpoint was written."""


SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a run to stop: a person, and what clusters send before they take a node away, often to a whole process group."""


def cause_of(error: BaseException) -> str:
    """Return the message of ``error``: its text, with its kind before it where that was not written for users."""
    return str(error) if isinstance(error, AptError) else f"{type(error).__name__}: {error}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a sentence with the valid names nearest to ``name``, or all of them if none is near."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.55)
    if not close:  # the last part of a dotted key may be right, its path wrong
        leaf = name.rsplit(".", 1)[-1]
        close = [candidate for candidate in names if candidate.rsplit(".", 1)[-1] == leaf][:3]
    if close:
        return f"Did you mean {' or '.join(repr(match) for match in close)}?"
    if len(names) > LONGEST_LIST:
        names = [candidate for candidate in names if "." not in candidate]
    return f"Valid names: {', '.join(names)}." if names else "There are no valid names here."


def validated(model: type[Model], values: Mapping[str, Any], *, key: str = "") -> Model:
    """Build a pydantic ``model`` from ``values``; ``key`` is where they stand in the config.

    Raises:
        ConfigError: all problems at once, each with its full key and the nearest valid names.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(*_problems(error, model, key)) from None


def _problems(error: ValidationError, model: type[BaseModel], prefix: str) -> list[str]:
    problems = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in (prefix, *item["loc"]) if part != "")
        kind, given = item["type"], item.get("input")
        if kind == "extra_forbidden":
            valid = _names(model, item["loc"][:-1])
            problems.append(f"{key}: unknown key. {nearest(str(item['loc'][-1]), valid)}")
        elif kind == "missing":
            problems.append(f"{key}: missing. Give it a value, for instance on the command line: {key}=...")
        elif kind == "literal_error":
            choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
            problems.append(f"{key}: {given!r} is not one of the choices. {nearest(str(given), choices)}")
        elif kind == "value_error":
            problems.append(f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"]))
        else:
            reason = item["msg"][0].lower() + item["msg"][1:]
            problems.append(f"{key}: {given!r} is not valid: {reason}.")
    return list(dict.fromkeys(problems))


def _names(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the model at ``path`` below ``model`` has."""
    for part in path:
        field = next((f for name, f in model.model_fields.items() if part in (f.alias, name)), None)
        if field is not None:  # else a key of a mapping or a place in a list, whose model was taken
            model = next((a for a in _annotations(field.annotation) if hasattr(a, "model_fields")), model)
    return [field.alias or name for name, field in model.model_fields.items()]


def _annotations(annotation: Any) -> list[Any]:
    """Return ``annotation`` and everything inside it: dict[str, X] | None has X."""
    return [annotation, *(inner for part in get_args(annotation) for inner in _annotations(part))]
