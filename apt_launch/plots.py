"""Pictures of a curriculum."""

from __future__ import annotations

from pathlib import Path

from apt_model.schedule import MODULES, Program


def draw_schedule(program: Program, path: Path) -> None:
    """Draw every anneal and switch over the run into a PNG at ``path``, from the functions that training calls."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    horizon = program.horizon
    anneals = program.curriculum.all_anneals
    stride = max(1, horizon.steps // 2000)
    steps = sorted(
        {
            *range(0, horizon.steps, stride),
            *range(0, horizon.steps, horizon.updates_per_epoch),
            horizon.steps - 1,
        }
    )
    states = [program.at(horizon.clock_at(step)) for step in steps]

    figure = Figure(figsize=(9, 1.2 + 1.5 * len(anneals) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(anneals) + 1,
        1,
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [1.5] * len(anneals) + [1.0]},
    )[:, 0]
    for axis, name in zip(axes, anneals, strict=False):
        values = [state[name] for state in states]
        axis.step([*steps, horizon.steps], [*values, values[-1]], where="post", color="tab:blue")
        axis.set_title(name, loc="left", fontsize=10)
        axis.margins(y=0.15)
        axis.grid(alpha=0.3)
        for step, value, where in ((0, values[0], "left"), (horizon.steps, values[-1], "right")):
            axis.annotate(
                f"{value:.4g}", (step, value), textcoords="offset points", xytext=(0, 4), ha=where, fontsize=8
            )
    switches = axes[-1]
    for row, module in enumerate(reversed(MODULES)):
        on = program.first_step(module)
        if on is not None:
            switches.barh(row, horizon.steps - on, left=on, height=0.6, color="tab:orange")
            switches.text(
                on,
                row,
                f" on from epoch {on // horizon.updates_per_epoch}, step {on}",
                va="center",
                fontsize=8,
            )
            for axis in axes[:-1]:
                axis.axvline(on, color="tab:orange", linewidth=0.8, linestyle=":")
    switches.set_yticks(range(len(MODULES)), list(reversed(MODULES)))
    switches.set_ylim(-0.6, len(MODULES) - 0.4)
    switches.set_xlim(0, horizon.steps)
    switches.set_xlabel(f"step ({horizon})")
    figure.savefig(path, dpi=110)
