"""The pictures of shapes in ``docs/schedule.md``, drawn from its own lines: ``python -m docs.pictures``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from apt_model.schedule import Anneal, Curriculum, Horizon

DOCS = Path(__file__).parent
UPDATES = 101
WIDTH, HEIGHT, MARGIN, TITLE = 216, 132, 12, 24

SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
<title>{name}: {shown}</title>
<g fill="none" stroke="#8888" stroke-width="1"><path d="M{left} {top}V{bottom}H{right}"/></g>
<path d="{line}" fill="none" stroke="#5c6bc0" stroke-width="2.5" stroke-linejoin="round" stroke-linecap="round"/>
<text x="{left}" y="16" fill="#808080" font-family="monospace" font-size="13">{name}</text>
</svg>
"""
"""Greys and a blue that can be read on white and on black."""


def shown() -> dict[str, Anneal]:
    """Return the anneals of the page's list of shapes, and of learning rates, by name."""
    rates = {name: Anneal.model_validate(rate) for name, rate in _listed("Learning rates by name").items()}
    return dict(Curriculum.read(_listed("Shapes")).anneals) | rates


def _listed(section: str) -> dict[str, Any]:
    page = (DOCS / "schedule.md").read_text(encoding="utf-8")
    block = re.search(rf"## {section}\n.*?```(?:yaml|text)\n(.*?)```", page, flags=re.DOTALL)
    assert block is not None
    listed: dict[str, Any] = yaml.safe_load(block.group(1))
    return listed


def picture(name: str, anneal: Anneal) -> str:
    """Return the SVG of a curve over a run of :data:`UPDATES` updates; the lower edge is 0, the upper its largest value."""
    curve = anneal.curve(Horizon(epochs=1, updates_per_epoch=UPDATES))
    values = [curve(update) for update in range(UPDATES)]
    left, right, top, bottom = MARGIN, WIDTH - MARGIN, MARGIN + TITLE, HEIGHT - MARGIN
    points = [
        (left + (right - left) * update / (UPDATES - 1), bottom - (bottom - top) * value / max(values))
        for update, value in enumerate(values)
    ]
    return SVG.format(
        width=WIDTH,
        height=HEIGHT,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        name=name,
        shown=f"the value over the run, from {values[0]:g} to {values[-1]:g}",
        line="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points),
    )


def main() -> None:
    """Write every picture."""
    folder = DOCS / "pictures"
    folder.mkdir(exist_ok=True)
    for name, anneal in shown().items():
        (folder / f"{name}.svg").write_text(picture(name, anneal), encoding="utf-8")


if __name__ == "__main__":
    main()
