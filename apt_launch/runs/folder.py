"""A run's folder: where things lie, whether it is free, and what a resume continues from."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig

from apt_launch import allow
from apt_launch.commands import config_flags, for_all_ranks, override, words_of
from apt_launch.config.run_config import RunConfig, is_neutral
from apt_launch.config.schema import DEFAULT_TRAINER, EXTRAS, Role, role_of
from apt_launch.values import changed_keys
from apt_model.data.tokenizer import read_tokenizer
from apt_model.errors import AptError, CheckpointError, ConfigError
from apt_model.files import STRICT, from_json, in_home, read_json, read_regular, refuse_links, refuse_place, write_json
from apt_model.schedule import Horizon
from apt_model.schedule.runner import horizon_changed
from apt_model.training.checkpoint import Checkpoints, name_of, newest_intact, read_manifest

OF_ONE_ATTEMPT = ("hydra.mode", "hydra.run.dir", "trainer.resume")
"""Keys whose values a command that resumes a run has of its own."""


@dataclass(frozen=True)
class Resume:
    """A checkpoint to continue from, and remarks about it."""

    checkpoint: Path
    rows: int  # of metrics, logged before it
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """A run that may start in its folder."""

    config: RunConfig
    resume: Resume | None
    held: tuple[object, ...]  # what the folder held when it was checked


@dataclass(frozen=True)
class _LeftOut:
    """The schema of ``left_out.json``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    updates: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class About:
    """The schema of what a run's checkpoint says of the run, in its manifest."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True}

    identity: str
    config: dict[str, Any]
    horizon: Horizon

    @classmethod
    def of(cls, checkpoint: Path, manifest: Mapping[str, Any]) -> About:
        """Return it.

        Raises:
            ConfigError: something is missing or of another type.
        """
        text = json.dumps(manifest["about"])
        return from_json(text, cls, where=f"{checkpoint / 'manifest.json'}: about", remedy="Remove that checkpoint.")


def about(config: RunConfig) -> dict[str, Any]:
    """Return what a run's checkpoints say of the run, as :class:`About` reads it."""
    return {"identity": config.identity, "config": config.result_values, "horizon": asdict(config.horizon)}


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.schedule = path / "schedule.png"
        self.checkpoints = path / "checkpoints"
        self.provenance = path / "provenance.json"
        self.tokenizer = path / "tokenizer.json"
        self.log = path / "train.log"
        self._left_out = path / "left_out.json"

    @property
    def holds_a_run(self) -> bool:
        """Whether there are results here that a new run would overwrite."""
        return (self.metrics.exists() and self.metrics.stat().st_size > 0) or bool(Checkpoints(self.checkpoints).all())

    def discard(self) -> None:
        """Remove what Hydra has put here for a run that was refused, if there is nothing else."""
        if (
            self.path.is_dir()
            and not self.path.is_symlink()
            and {path.name for path in self.path.iterdir()} <= {".hydra", self.log.name}
        ):
            shutil.rmtree(self.path)
            ours = Path.cwd() / "outputs"
            for above in (above for above in self.path.absolute().parents if ours in (above, *above.parents)):
                with contextlib.suppress(OSError):  # it holds more
                    above.rmdir()

    def how_to_resume(self, config: RunConfig) -> str:
        """Say how the run continues: by what began it, on as many ranks, from its newest checkpoint."""
        path = self.path / ".hydra" / "overrides.yaml"
        flags: list[str] = []
        if (
            HydraConfig.initialized()
        ):  # the command's own process: the file has no overrides of hydra.*, and may be elsewhere
            overrides = HydraConfig.get().overrides
            flags = config_flags()
            given = [str(one) for one in (*overrides.hydra, *overrides.task) if str(one) not in flags]
        else:
            given = _overrides_in(path)
        kept = [one for one in given if one.lstrip("+").partition("=")[0] not in OF_ONE_ATTEMPT]
        line, remark = for_all_ranks(
            words_of("apt_launch", *allow.flags(), *flags, *kept, *self.resume_overrides(config))
        )
        return f"Go on with{remark}: {line}"

    def resume_overrides(self, config: RunConfig) -> list[str]:
        """Return what a command that continues the run has of its own."""
        found = [override("hydra.run.dir", self.path), "trainer.resume=auto"]
        if type(config.trainer) in EXTRAS:  # it cannot continue, and the default one continues from checkpoints of all
            found.append(f"trainer._target_={DEFAULT_TRAINER}")
        return found

    def check(self, config: RunConfig) -> Checked:
        """Return that ``config`` may be run here, see :meth:`check_free`.

        Raises:
            ConfigError: the folder cannot be one that is written to, or is not free.
        """
        refuse_place(self.path, "hydra.run.dir")
        held = self._held()
        return Checked(config, self.check_free(config), held)

    def still(self, checked: Checked) -> Checked:
        """Return ``checked`` if nothing was trained here since, else what a new check says."""
        return checked if checked.held == self._held() else self.check(checked.config)

    def _held(self) -> tuple[object, ...]:
        rows = self.metrics.stat().st_size if self.metrics.exists() else None
        return rows, *(path.name for path in Checkpoints(self.checkpoints).all())

    def check_free(self, config: RunConfig) -> Resume | None:
        """Make sure that nothing of another run would be lost here; return what a resume continues from, see :meth:`resume`.

        Raises:
            ConfigError: the folder holds a run and ``trainer.resume`` does not say to continue it.
        """
        refuse_links(self.path, "hydra.run.dir")
        resume = self.resume(config)
        own = resume is not None and self.owns(resume.checkpoint)
        if resume is None and config.trainer.init_from is not None:
            initial_checkpoint(config)
        if self.holds_a_run and not own and config.trainer.resume != "auto":
            raise ConfigError(
                f"hydra.run.dir: {self.path} already holds a run. Go on with it by trainer.resume=auto, or choose another "
                "folder."
            )
        return resume

    def owns(self, checkpoint: Path) -> bool:
        """Return whether ``checkpoint`` is one of this folder's."""
        return checkpoint.parent.resolve() == self.checkpoints.resolve()

    def left_out(self) -> list[tuple[int, int]]:
        """Return the updates that rollbacks found: (epoch, first batch).

        Raises:
            ConfigError: the file is damaged.
        """
        remedy = "Remove it: the updates that it names are then tried again."
        try:
            return list(read_json(self._left_out, _LeftOut, remedy=remedy).updates)
        except FileNotFoundError:
            return []

    def leave_out(self, updates: list[tuple[int, int]]) -> None:
        """Note updates that every later attempt leaves out."""
        write_json(self._left_out, {"updates": updates})

    def resume(self, config: RunConfig) -> Resume | None:
        """Find what ``trainer.resume`` names; None: start from nothing.

        Raises:
            ConfigError: there is no such checkpoint, or it is of a run that cannot be continued with this config.
        """
        asked = config.trainer.resume
        if asked is None:
            return None
        if asked == "auto":
            checkpoint, passed_over = newest_intact(self.checkpoints)
            if checkpoint is None:
                if passed_over:
                    raise ConfigError(*[f"trainer.resume: {reason}" for reason in passed_over])
                return None
        else:
            checkpoint, passed_over = find_checkpoint(in_home(asked, "trainer.resume"), "trainer.resume")
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError as error:
            raise ConfigError(f"trainer.resume: {error}") from None
        about = About.of(checkpoint, manifest)
        run = checkpoint.parent.parent
        differ = differences(about.config, config)
        fixed = [key for key, (before, _) in differ.items() if before is not ... and role_of(key) is Role.FIXED]
        if fixed:
            raise ConfigError(
                *[
                    f"{key}: the run in {run} was trained with {_shown(before)}, and a resume cannot change it to "
                    f"{_shown(now)}."
                    for key, (before, now) in differ.items()
                    if key in fixed
                ]
            )
        kept, now = run / self.tokenizer.name, config.corpus.tokenizer_file
        if now is not None and kept.exists() and read_tokenizer(kept) != read_tokenizer(now):
            raise ConfigError(
                f"data: {now} is not the tokenizer that the run was trained with, which is kept in {kept}."
            )
        if config.schedule.on_horizon_change == "error" and about.horizon != config.horizon:
            raise ConfigError(horizon_changed(about.horizon, config.horizon))
        if _epochs_done(manifest, about) >= config.horizon.epochs:
            self._refuse_to_rename(checkpoint, manifest, about, config, [*differ])
        notes = [*passed_over]
        if type(config.trainer) in EXTRAS:
            option, _ = EXTRAS[type(config.trainer)]
            notes.append(f"trainer={option} cannot continue from a checkpoint: trainer=default trains the rest")
        if differ:
            notes.append(f"resumed with other values than before: {', '.join(differ)}")
        return Resume(checkpoint.absolute(), manifest.get("rows", 0), tuple(notes))

    def _refuse_to_rename(
        self, checkpoint: Path, manifest: Mapping[str, Any], about: About, config: RunConfig, differ: list[str]
    ) -> None:
        """Make sure that a run of which nothing is left to train is kept as what it is.

        Raises:
            ConfigError: it would have another folder, or a config that no update had.
        """
        run = checkpoint.parent.parent
        others = [key for key in differ if key != "trainer._target_"]  # only trainer=default resumes, whichever began
        if not others and about.horizon.steps != config.horizon.steps:
            others = [f"the length of the data ({about.horizon} before, now {config.horizon})"]
        elsewhere = not self.owns(checkpoint)
        if not others and not elsewhere:
            return
        what = [f"in {self.path}"] if elsewhere else []
        if others:
            what.append(f"with what differs now: {', '.join(others)}")
        raise ConfigError(
            f"trainer.resume: the run in {run} has ended: it is at update {manifest['step']}, and {config.horizon.steps} are "
            f"planned. Nothing would be trained {' '.join(what)}. Make it longer: "
            f"trainer.max_epochs={_epochs_done(manifest, about) + 1} or more, with schedule.on_horizon_change=rescale or "
            "keep_absolute; or begin a new run from its weights, without trainer.resume: "
            f"{override('trainer.init_from', run)} hydra.run.dir=ANOTHER_FOLDER"
        )


def differences(before: Mapping[str, Any], config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys that can change a result and differ from ``before``, each with both values; ``...``: there is none.

    A key that no resume can change, and that one side does not have, had its default there.
    """
    now = config.result_values
    found = {}
    for key in changed_keys(before, now):
        default = config.default_of(key) if role_of(key) is Role.FIXED else ...
        values = before.get(key, default), now.get(key, default)
        if not is_neutral(key) and values[0] != values[1]:
            found[key] = values
    return found


def _shown(value: object) -> str:
    return repr(None if value is ... else value)


def _epochs_done(manifest: Mapping[str, Any], about: About) -> int:
    """Return after how many epochs all batches of a checkpoint's run were trained."""
    epochs: int | None = manifest.get("epochs")
    return manifest["step"] // max(1, about.horizon.updates_per_epoch) if epochs is None else epochs


def _overrides_in(path: Path) -> list[str]:
    """Return the overrides that a run's folder has kept; none, where they cannot be read."""
    import yaml

    try:
        found = yaml.safe_load(read_regular(path))
    except (FileNotFoundError, ConfigError, yaml.YAMLError, ValueError, RecursionError):
        return []
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def initial_checkpoint(config: RunConfig) -> Path:
    """Return the checkpoint that ``trainer.init_from`` names.

    Raises:
        ConfigError: there is none, or its tokens mean something else than this run's.
    """
    assert config.trainer.init_from is not None
    checkpoint, _ = find_checkpoint(in_home(config.trainer.init_from, "trainer.init_from"), "trainer.init_from")
    kept, now = checkpoint.parent.parent / "tokenizer.json", config.corpus.tokenizer_file
    alike = kept.exists() == (now is not None) and (now is None or read_regular(kept) == read_regular(now))
    if not alike:
        raise ConfigError(
            f"trainer.init_from: the tokens of {checkpoint.parent.parent} are "
            f"{f'those of {kept}' if kept.exists() else 'bytes'}, and those of this run {now or 'bytes'}. Set data.tokenizer to "
            f"{kept if kept.exists() else 'null'}."
        )
    return checkpoint


def chosen_checkpoint(path: Path, which: str, *, key: str, option: str) -> tuple[Path, list[str]]:
    """Return the checkpoint of the run in ``path`` that ``which`` means, and why others were passed over.

    Args:
        path: a run's folder, the folder of its checkpoints, or, for ``newest`` alone, one of those.
        which: ``newest``, ``best`` (lowest val/loss), or a number of updates.
        key: where the user named ``path``, for errors.
        option: where the user said ``which``, for errors.

    Raises:
        ConfigError: there is none.
    """
    if which == "newest":
        return find_checkpoint(path, key)
    if path.name.startswith("step-"):
        raise ConfigError(f"{option} {which}: {path} is one checkpoint. Leave {option} out, or name the run's folder.")
    checkpoints = Checkpoints(path if path.name == "checkpoints" else path / "checkpoints")
    there = {found.name: found for found in checkpoints.all()}
    if which == "best":
        losses, passed_over = {}, []
        for found in there.values():
            try:
                losses[found] = read_manifest(found).get("loss")
            except AptError as error:
                passed_over.append(str(error))
        known = {found: loss for found, loss in losses.items() if loss is not None}
        if known:
            return min(known, key=lambda found: known[found]), passed_over
        find_checkpoint(path, key)
        raise ConfigError(
            f"{option} best: no checkpoint in {str(checkpoints.folder)!r} has a val/loss. Take the newest, or a step."
        )
    name = name_of(int(which)) if which.isdecimal() and len(which) < 9 else which
    if name not in there:
        known_steps = ", ".join(map(str, checkpoints.steps())) or "none"
        raise ConfigError(
            f"{option}: there is no {which!r} in {str(checkpoints.folder)!r}. Steps: {known_steps}. Or newest, best."
        )
    return there[name], []


def find_checkpoint(path: Path, key: str) -> tuple[Path, list[str]]:
    """Return the checkpoint ``path``, or the newest whole one of the run in ``path``, and why newer ones were passed over.

    Raises:
        ConfigError: there is none; ``key`` is where the user said so.
    """
    if path.name.startswith("step-"):
        if not path.is_dir():
            raise ConfigError(f"{key}: there is no checkpoint {str(path)!r} (looked in {Path.cwd()}).")
        return path, []
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    checkpoint, passed_over = newest_intact(folder)
    if checkpoint is None:
        reasons = passed_over or [
            f"there is no checkpoint in {str(folder)!r} (looked in {Path.cwd()}). Name a run's folder, "
            "or a folder such as RUN/checkpoints/step-00000100."
        ]
        raise ConfigError(*[f"{key}: {reason}" for reason in reasons])
    return checkpoint, passed_over
