"""Scheduled values in rows of metrics: ``schedule/route_temp``, ``schedule/moe_enabled`` (0 or 1) and so on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apt_model.schedule.targets import MODULES

Row = Mapping[str, float]


def as_metrics(values: Mapping[str, bool | float]) -> dict[str, float]:
    """Return labels and names of anneals as names of metrics, with their values."""
    return {f"schedule/{name}": float(value) for name, value in values.items()}


def modules_on(row: Row) -> list[str]:
    """Return the modules that are enabled in ``row``."""
    return [module for module in MODULES if row.get(f"schedule/{module}_enabled")]


def is_anneal(key: str) -> bool:
    """Say whether a row has a scheduled value under ``key``."""
    return key.startswith("schedule/") and not key.endswith(("_enabled", "_frozen"))


def anneals(row: Row) -> dict[str, float]:
    """Return the scheduled values in ``row``, by the names of their anneals."""
    return {key.removeprefix("schedule/"): value for key, value in row.items() if is_anneal(key)}


def first_on(rows: Sequence[Row]) -> dict[str, Row]:
    """Return, for each module that was ever on, the first of ``rows`` that says so."""
    found = {module: next((row for row in rows if row.get(f"schedule/{module}_enabled")), None) for module in MODULES}
    return {module: row for module, row in found.items() if row is not None}
