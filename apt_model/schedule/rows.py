"""Scheduled values in rows of metrics: ``schedule/route_temp``, ``schedule/moe_enabled`` (0 or 1) and so on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from apt_model.schedule.targets import MODULES

Row = Mapping[str, float]


def as_metrics(values: Mapping[str, bool | float]) -> dict[str, float]:
    """Return labels and names of anneals as names of metrics, with their values."""
    return {f"schedule/{name}": float(value) for name, value in values.items()}


def modules_on(row: Row) -> list[str]:
    """Return the modules that are enabled in ``row``."""
    return [module for module in modules_in([row]) if row.get(f"schedule/{module}_enabled")]


def modules_in(rows: Iterable[Row]) -> list[str]:
    """Return the modules that ``rows`` say something of: this project's first, in their order."""
    found = dict.fromkeys(
        key.removeprefix("schedule/").removesuffix("_enabled")
        for row in rows
        for key in row
        if key.startswith("schedule/") and key.endswith("_enabled")
    )
    return [*(module for module in MODULES if module in found), *(module for module in found if module not in MODULES)]


def is_anneal(key: str) -> bool:
    """Say whether a row has a scheduled value under ``key``."""
    return key.startswith("schedule/") and not key.endswith(("_enabled", "_frozen"))


def anneals(row: Row) -> dict[str, float]:
    """Return the scheduled values in ``row``, by the names of their anneals."""
    return {key.removeprefix("schedule/"): value for key, value in row.items() if is_anneal(key)}


def first_on(rows: Sequence[Row]) -> dict[str, Row]:
    """Return, for each module that was ever on, the first of ``rows`` that says so."""
    found = {
        module: next((row for row in rows if row.get(f"schedule/{module}_enabled")), None)
        for module in modules_in(rows)
    }
    return {module: row for module, row in found.items() if row is not None}
