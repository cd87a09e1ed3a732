"""From what Hydra composed to a config that is known to be right. Nothing here loads torch."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from apt_launch.menu import CONF as CONF
from apt_model.errors import ConfigError, nearest, validated

if TYPE_CHECKING:
    from apt_launch import schema
    from apt_model.data import Corpus
    from apt_model.schedule import Horizon, Program


NEUTRAL = (
    "data.cache",
    "data.verify",
    "launch",
    "logger",
    "profile_file",
    "schedule.on_horizon_change",
    "trainer.resume",
    "trainer.parallel",
    "trainer.expert_parallel",
    "trainer.log_every",
    "trainer.checkpoint_every_epochs",
    "trainer.checkpoint_every_minutes",
    "trainer.keep_last",
    "trainer.keep_best",
    "trainer.keep_every",
    "trainer.stall_minutes",
    "trainer.keep_freed_memory",
)
"""Keys that cannot change what a run computes: no part of its identity."""


@dataclass(frozen=True)
class RunConfig:
    """A run's config, checked. ``values`` is what YAML says, resolved; the groups are the same, typed."""

    values: dict[str, Any]
    seed: int
    model: schema.GPTConfig
    moe: schema.MoEConfig
    align: schema.BiStateConfig
    voter: schema.VoterConfig
    schedule: schema.ScheduleConfig
    data: schema.Group
    optimizer: schema.AdamWConfig
    trainer: schema.TrainerConfig
    logger: schema.Group
    launch: schema.LaunchConfig
    horizon: Horizon
    program: Program

    @property
    def result_values(self) -> dict[str, Any]:
        """The values that decide what the run computes, flat: dotted key to value."""
        flat = flatten(self.values)
        return {key: value for key, value in flat.items() if not is_neutral(key)}

    @property
    def identity(self) -> str:
        """The sha256 of what decides the result."""
        text = json.dumps(self.result_values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def resuming(self) -> RunConfig:
        """Return the same run, to go on from its own newest checkpoint."""
        values = {**self.values, "trainer": {**self.values["trainer"], "resume": "auto"}}
        return replace(self, values=values, trainer=self.trainer.model_copy(update={"resume": "auto"}))


def is_neutral(key: str) -> bool:
    """Say whether a key cannot change what a run computes."""
    return any(key == name or key.startswith(f"{name}.") for name in NEUTRAL)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one: dotted key to value; lists and empty mappings stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{full}.")
        else:
            flat[full] = value
    return flat


def load(cfg: DictConfig, counts: Counts | None = None) -> RunConfig:
    """Resolve and check what Hydra composed; ``counts``: see :func:`parse`.

    Raises:
        ConfigError: with every problem found.
    """
    values = {str(key): _resolved(cfg, str(key)) for key in cfg if key != "hydra"}
    return parse(values, counts)


def load_data(cfg: DictConfig) -> dict[str, Any]:
    """Resolve and check the group ``data`` alone; no file is looked at.

    Raises:
        ConfigError: with every problem found.
    """
    from apt_launch.guard import check_secrets

    values: dict[str, Any] = {"data": _resolved(cfg, "data")}
    check_secrets(values)
    problems = _missing_libraries({"data": _parse_group("data", values["data"])})
    if problems:
        raise ConfigError(*problems)
    data: dict[str, Any] = values["data"]
    return data


def _resolved(cfg: DictConfig, key: str) -> Any:
    """Return what stands under ``key`` as plain values.

    Raises:
        ConfigError: a value is missing, or means nothing.
    """
    try:
        node = cfg[key]
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: has no value yet. Set it: {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None


def composed(overrides: list[str]) -> RunConfig:
    """Compose ``conf/`` with ``overrides`` and check it, as the command does.

    Raises:
        ConfigError: with every problem found.
        HydraException: an override that means nothing; see :func:`apt_launch.explain.explained`.
    """
    with composing() as compose:
        return load(compose(overrides))


@contextmanager
def composing() -> Iterator[Callable[[list[str]], DictConfig]]:
    """Compose ``conf/`` with overrides meanwhile; what Hydra composes elsewhere in this process stays as it is."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield lambda overrides: compose("config", overrides=overrides, return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = before


def parse(values: dict[str, Any], counts: Counts | None = None) -> RunConfig:
    """Check plain values; see :func:`load`. ``counts`` keeps what was counted, for the next of many configs."""
    groups, top = parse_groups(values)
    _check_together(values, groups, top.launch)
    horizon = plan_horizon(values, groups, {} if counts is None else counts)
    program = check_curriculum(values, groups, horizon)
    return RunConfig(values=values, seed=top.seed, launch=top.launch, horizon=horizon, program=program, **groups)


def parse_groups(values: Mapping[str, Any]) -> tuple[dict[str, Any], schema.TopLevel]:
    """Check each group, and what is in none, by itself; no file is looked at.

    Raises:
        ConfigError: with every problem found.
    """
    from apt_launch import schema
    from apt_launch.guard import check_secrets

    check_secrets(values)
    problems: list[str] = []
    groups: dict[str, Any] = {}
    for name in schema.GROUPS:
        try:
            groups[name] = _parse_group(name, values.get(name))
        except ConfigError as error:
            problems += error.problems
    rest = {key: value for key, value in values.items() if key not in schema.GROUPS}
    for key in [key for key in rest if key not in schema.TopLevel.model_fields]:
        del rest[key]
        problems.append(f"{key}: unknown key. {nearest(key, schema.all_keys())}")
    try:
        top = validated(schema.TopLevel, rest)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return groups, top


def _parse_group(name: str, group: Any) -> schema.Group:
    """Check one group by itself.

    Raises:
        ConfigError: with every problem found.
    """
    from apt_launch import schema

    schemas = schema.GROUPS[name]
    if not isinstance(group, Mapping):
        raise ConfigError(f"{name}: {group!r} is not valid: choose one of the group's options, for instance in conf/.")
    target = group.get("_target_")
    if not isinstance(target, str | None) or target not in schemas:
        known = [str(known) for known in schemas]
        raise ConfigError(f"{name}._target_: {target!r} may not be built here. {nearest(str(target), known)}")
    return validated(schemas[target], group, key=name)


def check_curriculum(values: Mapping[str, Any], groups: Mapping[str, Any], horizon: Horizon) -> Program:
    """Check that the curriculum and the learning rate's schedule can happen in this run.

    Raises:
        ConfigError: with every problem found.
    """
    from apt_launch.catalogue import metrics, parameters, targets
    from apt_model.schedule import Program
    from apt_model.schedule.targets import NOT_NEGATIVE

    problems: list[str] = []
    lr_schedule = groups["trainer"].lr_schedule
    if lr_schedule is not None:
        problems += lr_schedule.problems("trainer.lr_schedule", horizon, NOT_NEGATIVE)
        if lr_schedule.anchors():
            problems.append(
                "trainer.lr_schedule: it cannot wait for an event; write schedule.anneals with target: optimizer.lr, and "
                "trainer.lr_schedule=null."
            )
        if lr_schedule.target is not None:
            problems.append("trainer.lr_schedule.target: it always is the learning rate's factor. Set it to null.")
    program = None
    try:
        program = Program(groups["schedule"], horizon)
        program.check_targets(targets(values), parameters(values))
        writes_lr = any(groups["schedule"].target_of(name) == "optimizer.lr" for name in groups["schedule"].all_anneals)
        if writes_lr and lr_schedule is not None:
            problems.append(
                "schedule.anneals: optimizer.lr is written by trainer.lr_schedule already. Set trainer.lr_schedule=null."
            )
        known = metrics(values)
        problems += [
            f"schedule.events: there is no metric {metric!r}. {nearest(metric, known)}"
            for metric in sorted(program.watched - known)
        ]
        problems += [
            f"schedule.events: a latch turns {subject.name} on by {when.metric}, which comes only while {subject.name} is on. "
            "Choose another metric, or give the latch a deadline."
            for subject, when in program.latches.items()
            if when.metric.startswith(f"{subject.name}/") and when.metric != "voter/entropy" and when.deadline is None
        ]
    except ConfigError as error:
        problems += error.problems
    if problems or program is None:
        raise ConfigError(*problems)
    return program


def _check_together(values: Mapping[str, Any], groups: Mapping[str, Any], launch: schema.LaunchConfig) -> None:
    """Refuse values that are right each by itself and wrong together."""
    from apt_launch.schema import EXTRAS

    model, moe, schedule, optimizer = (groups[name] for name in ("model", "moe", "schedule", "optimizer"))
    problems = []
    if model.d_model % (2 * model.num_heads):
        problems.append(
            f"model.d_model = {model.d_model} does not give {model.num_heads} heads (model.num_heads) of an even width, "
            f"which rotary positions need. Make it a multiple of {2 * model.num_heads}."
        )
    if moe.top_k > moe.num_experts:
        problems.append(f"moe.top_k = {moe.top_k} is more than moe.num_experts = {moe.num_experts}.")
    problems += _expert_problems(model, moe)
    if moe.capacity_factor is None and schedule.moe_capacity is not None:
        problems.append(
            "moe.capacity_factor is null (dropless), but schedule.moe_capacity anneals it. Set schedule.moe_capacity=null, "
            "or give moe.capacity_factor a number."
        )
    ranks = launch.nodes * launch.tasks_per_node
    if groups["trainer"].batch_size % ranks:
        problems.append(
            f"trainer.batch_size = {groups['trainer'].batch_size} cannot be shared by {ranks} ranks (launch.nodes x "
            f"launch.tasks_per_node). Make it a multiple of {ranks}."
        )
    if ranks > 1 and type(groups["trainer"]) in EXTRAS:
        problems.append(
            f"launch: {ranks} ranks share batches with trainer=default only. Choose it, or set launch.nodes=1 "
            "launch.tasks_per_node=1."
        )
    problems += _sharing_problems(groups, ranks)
    problems += schedule.contradictions()
    problems += _missing_libraries(groups) or _vocabulary_problems(values["data"], model.vocab_size)
    problems += _trainer_problems(groups["trainer"])
    if optimizer.weight_decay * optimizer.lr >= 1:
        problems.append(
            f"optimizer.weight_decay x optimizer.lr = {optimizer.weight_decay * optimizer.lr:g}: one update would erase the "
            "weights. Their product must be below 1."
        )
    if problems:
        raise ConfigError(*problems)


def _expert_problems(model: schema.GPTConfig, moe: schema.MoEConfig) -> list[str]:
    """Say why experts could not begin as the dense layer that is to be cut into them."""
    slices, problems = moe.granularity, []
    if model.d_ff % slices:
        problems.append(
            f"moe.granularity = {slices} does not divide model.d_ff = {model.d_ff}. Choose a divisor of it, such as "
            f"{math.gcd(slices, model.d_ff)}."
        )
    if moe.num_experts % slices or moe.num_experts < 2 * slices:
        problems.append(
            f"moe.num_experts = {moe.num_experts} is not two or more whole copies of the dense layer: with moe.granularity = "
            f"{slices}, {slices} experts are one. Experts are counted singly: as many weights as {moe.num_experts} whole "
            f"copies have moe.num_experts={moe.num_experts * slices}."
        )
    if moe.top_k % slices:
        problems.append(
            f"moe.top_k = {moe.top_k} does not reach whole copies of the dense layer: with moe.granularity = {slices}, "
            f"{slices} experts are one. Experts are counted singly: a token costs what {moe.top_k} whole copies cost with "
            f"moe.top_k={moe.top_k * slices}."
        )
    if moe.upcycling_share is not None and moe.upcycling == "copy":
        problems.append(
            f"moe.upcycling_share = {moe.upcycling_share:g} is read by moe.upcycling=noise and drop only. Choose one, or set it "
            "to null."
        )
    if moe.upcycling_share is not None and moe.upcycling == "drop" and moe.upcycling_share > 1:
        problems.append(f"moe.upcycling_share = {moe.upcycling_share:g} is no share of the channels. Give at most 1.")
    return problems


def _sharing_problems(groups: Mapping[str, Any], ranks: int) -> list[str]:
    """Say why ``ranks`` cannot share the model as the config says; how many a lone process is one of is not known yet."""
    from apt_launch.schema import EXTRAS

    model, moe, trainer = groups["model"], groups["moe"], groups["trainer"]
    experts = trainer.expert_parallel
    slices = f" / moe.granularity = {moe.granularity}" if moe.granularity > 1 else ""
    problems = []
    if type(trainer) in EXTRAS and (trainer.parallel != "ddp" or experts > 1):
        problems.append(
            f"trainer.parallel = {trainer.parallel}, trainer.expert_parallel = {experts}: they are for trainer=default. Choose "
            "it, or set trainer.parallel=ddp trainer.expert_parallel=1."
        )
    elif experts > 1 and trainer.parallel != "fsdp":
        problems.append(f"trainer.expert_parallel = {experts} needs trainer.parallel=fsdp. Set it, or 1.")
    if moe.num_experts % experts:
        problems.append(
            f"trainer.expert_parallel = {experts} does not divide moe.num_experts = {moe.num_experts}. Choose a divisor."
        )
    if ranks > 1 and ranks % experts:
        problems.append(
            f"trainer.expert_parallel = {experts} does not divide {ranks} ranks (launch.nodes x launch.tasks_per_node). "
            "Choose a divisor."
        )
    elif (
        ranks > 1
        and experts > 1
        and any(width % (ranks // experts) for width in (model.d_model, model.d_ff // moe.granularity))
    ):
        problems.append(
            f"trainer.expert_parallel = {experts} leaves {ranks // experts} ranks to cut each expert, and model.d_model = "
            f"{model.d_model} and model.d_ff = {model.d_ff}{slices} are not both multiples of that. Choose a larger one."
        )
    return problems


def _missing_libraries(groups: Mapping[str, Any]) -> list[str]:
    """Say what chosen options need and is not installed."""
    from apt_launch.schema import EXTRAS

    needed = [
        (name, *EXTRAS.get(type(groups[name]), ("", ())), f"choose {name}={default}")
        for name, default in (("trainer", "default"), ("logger", "wandb"), ("data", "text"))
        if name in groups
    ]
    if getattr(groups["data"], "tokenizer", None):
        needed.append(("data.tokenizer", "tokenizers", ("tokenizers",), "set data.tokenizer=null"))
    return [problem for choice in needed if (problem := missing_library(*choice))]


def missing_library(key: str, option: str, libraries: Sequence[str], otherwise: str) -> str | None:
    """Return what to tell if one of ``libraries``, which the extra ``option`` of this package brings, is not installed."""
    from importlib.util import find_spec

    missing = [library for library in libraries if find_spec(library) is None]
    if not missing:
        return None
    return f"{key}: {' and '.join(missing)} cannot be found. Run: pip install 'apt-launch[{option}]', or {otherwise}."


def _vocabulary_problems(data: Mapping[str, Any], vocab_size: int) -> list[str]:
    """Say whether the corpus has tokens that the model has not."""
    try:
        corpus = build_corpus(data)
        needed, place = corpus.vocab_size, corpus.tokenizer_file
    except ConfigError as error:
        return list(error.problems)
    if needed <= vocab_size:
        return []
    return [
        f"model.vocab_size = {vocab_size} is less than the {needed} tokens of {place or 'a corpus of bytes'}. Set "
        f"model.vocab_size={needed}, or more."
    ]


def _trainer_problems(trainer: schema.TrainerConfig) -> list[str]:
    """Say what the chosen trainer was asked for and cannot do."""
    from apt_launch.schema import EXTRAS, HFConfig

    problems = []
    if trainer.resume is not None and type(trainer) in EXTRAS:
        option, _ = EXTRAS[type(trainer)]
        problems.append(
            f"trainer.resume: trainer={option} cannot go on from a checkpoint. Choose trainer=default, which goes on from "
            "those of every trainer, or set trainer.resume=null."
        )
    if trainer.on_nonfinite != "stop" and type(trainer) in EXTRAS:
        problems.append(f"trainer.on_nonfinite: {trainer.on_nonfinite} is for trainer=default only. Set it to stop.")
    if isinstance(trainer, HFConfig) and trainer.device.removeprefix("cuda:").strip("0").isdigit():
        number = trainer.device.removeprefix("cuda:")
        problems.append(
            f"trainer.device: trainer=hf takes the first device that it sees, not {trainer.device}. Set "
            f"trainer.device=cuda and the environment's CUDA_VISIBLE_DEVICES={number}."
        )
    return problems


Counts = dict[str, int]
"""Tokens of a corpus: its config and a split as JSON, to their number."""


def plan_horizon(values: Mapping[str, Any], groups: Mapping[str, Any], counts: Counts) -> Horizon:
    """Count the corpus, unless ``counts`` knows it, and plan the run's updates.

    Raises:
        ConfigError: a file is missing or wrong, or the text does not fill one batch.
    """
    from apt_model.data import Sampler
    from apt_model.schedule import Horizon

    trainer, model = groups["trainer"], groups["model"]
    batches = {}
    for split, limit in (("train", trainer.max_batches_per_epoch), ("val", trainer.validation_batches)):
        counted = json.dumps([values["data"], split])
        if counted not in counts:
            with making_tokens(build_corpus(values["data"])) as corpus:
                counts[counted] = corpus.count(split)  # type: ignore[arg-type]
        sampler = Sampler(
            num_tokens=counts[counted],
            seq_len=model.seq_len,
            batch_size=trainer.batch_size,
            seed=values["seed"],
            limit=limit,
            name=split,
        )
        batches[split] = sampler.num_batches
    return Horizon.plan(
        epochs=trainer.max_epochs,
        batches_per_epoch=batches["train"],
        accumulate=trainer.accumulate,
        batch_size=trainer.batch_size,
        tokens_per_sample=model.seq_len,
    )


def build_corpus(values: Mapping[str, Any]) -> Corpus:
    """Build the corpus that the ``data`` group describes; no text is read.

    Raises:
        ConfigError: its values make no sense together.
    """
    from apt_launch.build import build

    corpus: Corpus = build(values)
    return corpus


@contextmanager
def making_tokens(corpus: Corpus) -> Iterator[Corpus]:
    """Show how far the corpus' tokens are made, if they have to be made meanwhile."""
    progress: Any = None

    def told(split: str, done: float, tokens: int) -> None:
        nonlocal progress
        if progress is None:
            from apt_launch.console import TokenProgress

            progress = TokenProgress()
        progress.tell(split, done, tokens)

    corpus.told = told
    try:
        yield corpus
    finally:
        if progress is not None:
            progress.close()


def show_error(error: ConfigError) -> None:
    """Tell the user what is wrong with the config."""
    count = len(error.problems)
    sys.stderr.write("error: " + (f"{count} problems\n  " if count > 1 else "") + "\n  ".join(error.problems) + "\n")


class CheckBeforeStart(Callback):
    """Checks a run before Hydra makes its folder, so that a mistake leaves nothing behind."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Leave with exit code 2 if the config is wrong. (An exception would be turned into a warning by Hydra.)"""
        from apt_launch.folder import RunFolder

        try:
            RunFolder(Path(config.hydra.run.dir)).check_free(load(config))
        except ConfigError as error:
            show_error(error)
            raise SystemExit(2) from None
