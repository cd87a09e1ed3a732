"""A run's trainer, with all that it needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apt_launch.config.instantiate import build, build_callbacks, build_loss, build_model, factory
from apt_launch.config.run_config import RunConfig
from apt_launch.config.schema import DEFAULT_TRAINER, EXTRAS
from apt_launch.runs.folder import initial_checkpoint

if TYPE_CHECKING:
    from apt_model.training.callbacks import Callback
    from apt_model.training.checkpoint import Checkpoints
    from apt_model.training.trainer import Trainer


def build_trainer(
    config: RunConfig,
    *,
    log: Callable[[dict[str, float]], None] = lambda row: None,
    callbacks: Sequence[Callback] = (),
    checkpoints: Checkpoints | None = None,
    resume: Path | None = None,
    leave_out: Collection[tuple[int, int]] = (),
    stop_requested: Callable[[], bool] = lambda: False,
    forks: Collection[int] = (),
) -> Trainer:
    """Return the trainer of a run, seeded; before the updates ``forks`` it writes a checkpoint for other runs.

    From a checkpoint, a run of another library's loop is continued by the default one: see ``can_resume`` of the trainers.
    """
    from apt_model.layouts.pretrained import PretrainedGPT
    from apt_model.training.distributed import from_rank_zero
    from apt_model.training.options import by_concern
    from apt_model.training.randomness import seed_all

    seed_all(config.seed)
    values = config.values
    model = build_model(values)
    if resume is None and isinstance(model, PretrainedGPT):
        model.load_pretrained()
    options = by_concern(
        values["trainer"]
        | {"seed": config.seed, "weight_decay": config.optimizer.weight_decay, "leave_out": frozenset(leave_out)}
        | {"seq_len": config.model.seq_len}
    )
    continued = resume is not None and type(config.trainer) in EXTRAS
    trainer: Trainer = build(
        {"_target_": DEFAULT_TRAINER if continued else values["trainer"]["_target_"]},
        **options,
        model=model,
        loss=build_loss(values),
        optimizer=factory(values["optimizer"]),
        schedule=build(values["schedule"], horizon=config.horizon, program=config.program, broadcast=from_rank_zero),
        corpus=config.corpus,
        resume=resume,
        checkpoints=checkpoints,
        log=log,
        callbacks=[*callbacks, *build_callbacks(values)],
        stop_requested=stop_requested,
    )
    trainer.forks = frozenset(forks)
    if config.trainer.init_from is not None and resume is None:
        trainer.init_from(initial_checkpoint(config))
    return trainer
