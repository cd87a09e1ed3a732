"""What may stand in YAML: numbers, times and lengths, and the base of all that is read from there."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from apt_model.schedule.times import Time


class Strict(BaseModel):
    """Base of everything read from YAML: unknown keys are errors, nothing is coerced, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


def length(value: Any) -> Any:
    """Check a length or time whose bare numbers count in ``by``; it is parsed where ``by`` is known."""
    Time.parse(value, by="step")
    return value


def span(value: Any) -> Any:
    """Check a length: what comes after an event is a time, and no length."""
    if Time.parse(value, by="step").anchor is not None:
        raise ValueError(f"{value!r} is a time after an event; a length such as 500st, 2ep or 10% is wanted here")
    return value


def written_time(value: Any) -> Time:
    """Read a time that must say its unit."""
    if isinstance(value, int) and value and not isinstance(value, bool):
        raise ValueError(f"{value} of what? Write {value}ep for epochs, {value}st for steps")
    return Time.parse(value, by="step")


def named(value: Any) -> Any:
    """Check the names of a mapping: rows, tables and lines of a log have them as they are."""
    for name in value if isinstance(value, dict) else ():
        if isinstance(name, str) and not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{name!r} cannot be a name. Call it by letters, digits, _, - and . alone, such as late_2")
    return value


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Length = Annotated[Any, BeforeValidator(length)]
Span = Annotated[Any, BeforeValidator(span)]
WrittenTime = Annotated[Any, BeforeValidator(written_time)]
Pattern = Annotated[str, Field(min_length=1)]

Value = TypeVar("Value")
Named = Annotated[dict[str, Value], BeforeValidator(named)]
