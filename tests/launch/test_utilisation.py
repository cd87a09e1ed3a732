"""How fast phases were trained, and what share of a GPU's peak that is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from apt_launch.config.gpus import GPUS, kind_of
from apt_launch.config.run_config import RunConfig
from apt_launch.config.sizes import sizes
from apt_launch.rows import Speeds, as_speed
from apt_launch.runs.utilisation import logging_utilisation

DENSE, EXPERTS = {"schedule/moe_enabled": 0.0}, {"schedule/moe_enabled": 1.0}


def test_a_phase_has_the_speed_of_its_tokens_over_their_seconds() -> None:
    speeds = Speeds()
    rows = [
        {"tokens": 100, "tokens_per_second": 1.0, **DENSE},  # the first of a phase: something was compiled
        {"tokens": 200, "tokens_per_second": 100.0, "mfu": 0.5, **DENSE},  # a second
        {"tokens": 200, "val/loss": 3.0, **DENSE},
        {"tokens": 500, "tokens_per_second": 50.0, "mfu": 0.25, **DENSE},  # 6 seconds
        {"tokens": 600, "tokens_per_second": 20.0, **EXPERTS},
    ]
    for row in rows:
        speeds.add(row)
    found = speeds.by_phase()
    assert list(found) == ["dense", "moe"]
    assert found["dense"].tokens_per_second == pytest.approx(400 / 7)
    assert found["dense"].mfu == pytest.approx((0.5 + 6 * 0.25) / 7)
    assert found["moe"] == (20.0, None), "there is no other row"
    assert [as_speed(speed) for speed in found.values()] == ["57 tokens/s (28.6% MFU)", "20 tokens/s"]


def test_utilisation_is_the_phases_arithmetic_over_the_peak(small: Callable[..., RunConfig]) -> None:
    phases = sizes(small("schedule=none", "schedule.enable_moe_at_epoch=1"))
    dense, experts = (phase.training_flops for phase in phases)
    assert experts > dense
    rows: list[dict[str, float]] = []
    log = logging_utilisation(rows.append, phases, peak=1e9)
    for step, on in ((0, DENSE), (3, DENSE), (4, EXPERTS), (6, EXPERTS)):
        log({"step": step, "tokens_per_second": 1000.0, **on})
    log({"step": 6, "val/loss": 3.0, **EXPERTS})
    found = [row.get("mfu") for row in rows]
    assert found == [None, pytest.approx(dense * 1e-6), None, pytest.approx(experts * 1e-6), None]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A10", None),
    ],
)
def test_devices_are_known_by_the_names_that_torch_gives_them(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind
    assert kind is None or kind in GPUS
