"""What every group of ``conf/`` may hold: keys, types, domains, roles. It is also the allow-list of ``_target_``.

Torch stays unloaded: a config is judged before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import Field

from apt_launch.sweep.options import LaunchConfig as LaunchConfig
from apt_launch.sweep.options import LocalLauncherConfig, NotNegative, SlurmLauncherConfig, Text
from apt_model.schedule import Anneal, Curriculum
from apt_model.schedule.fields import Positive, PositiveNumber, Strict
from apt_model.schedule.prefix import Reach

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
BetweenZeroAndOne = Annotated[float, Field(gt=0, lt=1)]


class Role(Enum):
    """What a key is to a run as a whole. Most keys have no role: they decide the result, and a resume may change them."""

    NEUTRAL = "cannot change what a run computes, but for last digits: no part of its identity"
    PROCESS = "neutral, and read by whoever owns the process and the run's folder, not by the trainer"
    FIXED = "a resume cannot change it: the weights or the order of the batches would not fit"


class Group(Strict):
    """A group's config: ``_target_`` names the class, the other keys are its parameters."""

    role: ClassVar[Role | None] = None
    """The role of every key that has none of its own."""

    reach: ClassVar[Reach | None] = None
    """Which updates the keys change that do not say so themselves."""

    target: str | None = Field(alias="_target_")


class GPTConfig(Group):
    """``model=gpt``."""

    role = Role.FIXED

    vocab_size: Positive
    d_model: Positive
    num_heads: Positive
    num_layers: Positive
    d_ff: Positive
    seq_len: Positive
    attention: Literal["sdpa", "eager"]
    ffn: Literal["swiglu", "gelu", "relu2"]
    dropout: BelowOne
    label_smoothing: BelowOne
    loss_chunk: Positive | None


class MoEConfig(Group):
    """``moe=experts``."""

    reach = Reach.MOE

    num_experts: Annotated[int, Field(ge=2), Role.FIXED]
    top_k: Positive
    granularity: Annotated[Positive, Role.FIXED]
    upcycling: Literal["copy", "noise", "drop"]
    upcycling_share: PositiveNumber | None
    capacity_factor: PositiveNumber | None
    eval_capacity_factor: PositiveNumber | None = None  # runs of earlier versions have no such key
    overflow: Literal["reroute", "drop"] = "drop"  # the default is what runs of earlier versions had
    temperature: PositiveNumber
    router: Annotated[Literal["softmax", "sigmoid"], Role.FIXED]
    balance_loss_weight: NotNegative
    z_loss_weight: NotNegative
    bias_update_rate: NotNegative
    jitter: BelowOne
    shared_expert: Annotated[bool, Role.FIXED]


class BiStateConfig(Group):
    """``align=bistate``."""

    reach = Reach.ALIGN

    rank: Annotated[Positive, Role.FIXED]
    alpha: Share
    beta: Share
    tau: PositiveNumber
    weight: NotNegative


class VoterConfig(Group):
    """``voter=entropy``."""

    reach = Reach.VOTER

    threshold: NotNegative
    num_votes: Positive
    dropout: BelowOne


class ScheduleConfig(Group, Curriculum):
    """``schedule=...``."""

    reach = Reach.SCHEDULED

    on_horizon_change: Annotated[Literal["error", "rescale", "keep_absolute"], Role.NEUTRAL] = "error"


class _DocumentsConfig(Group):
    """Documents of text: what makes tokens of them. The defaults are what runs of earlier versions had."""

    role = Role.FIXED

    tokenizer: Text | None = None
    cache: Annotated[Text | None, Role.NEUTRAL] = None


class StdlibConfig(_DocumentsConfig):
    """``data=stdlib``."""

    val_fraction: BetweenZeroAndOne
    seed: Seed


class TextConfig(_DocumentsConfig):
    """``data=text``."""

    path: Text
    suffix: str
    val_fraction: BetweenZeroAndOne
    seed: Seed


class JsonlConfig(_DocumentsConfig):
    """``data=jsonl``."""

    train_path: Text
    val_path: Text
    text_key: Text
    source_key: Text | None = None


class HFDatasetConfig(_DocumentsConfig):
    """``data=hf``."""

    path: Text
    name: Text | None
    data_files: Text | list[Text] | dict[str, Text | list[Text]] | None
    revision: Text | None
    train_split: Text
    val_split: Text | None
    val_documents: Positive
    text_key: Text
    source_key: Text | None = None
    streaming: bool
    max_documents: Positive | None
    max_tokens: Positive | None


class ShardsConfig(Group):
    """``data=shards``."""

    role = Role.FIXED

    path: Text
    verify: Annotated[bool, Role.NEUTRAL]


class AdamWConfig(Group):
    """``optimizer=adamw``."""

    target: Annotated[str | None, Role.FIXED] = Field(alias="_target_")
    lr: Annotated[PositiveNumber, Reach.SCHEDULED]
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)]
    eps: PositiveNumber
    weight_decay: NotNegative
    fused: bool


class TrainerConfig(Group):
    """``trainer=default``."""

    max_epochs: Annotated[Positive, Reach.SCHEDULED]
    max_batches_per_epoch: Positive | None
    batch_size: Annotated[Positive, Role.FIXED]
    accumulate: Annotated[Positive, Role.FIXED]
    parallel: Annotated[Literal["ddp", "fsdp"], Role.NEUTRAL, Reach.ALL]
    expert_parallel: Annotated[Positive, Role.NEUTRAL, Reach.ALL]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    compile: bool = False
    activation_checkpointing: Annotated[bool, Role.NEUTRAL, Reach.ALL] = False
    grad_clip: PositiveNumber | None
    lr_schedule: Annotated[Anneal | None, Reach.SCHEDULED]
    resume: Annotated[Text | None, Role.PROCESS]
    log_every: Annotated[Positive, Role.NEUTRAL, Reach.ALL]
    validation_batches: Positive | None
    checkpoint_every_epochs: Annotated[Positive, Role.NEUTRAL]
    checkpoint_every_minutes: Annotated[PositiveNumber | None, Role.NEUTRAL]
    keep_last: Annotated[Positive, Role.PROCESS]
    keep_best: Annotated[int, Field(ge=0), Role.PROCESS]
    keep_every: Annotated[Positive | None, Role.PROCESS]
    on_nonfinite: Literal["stop", "skip", "rollback"]
    stall_minutes: Annotated[PositiveNumber | None, Role.PROCESS]
    keep_freed_memory: Annotated[bool, Role.PROCESS]
    onednn_products: Annotated[bool, Role.PROCESS, Reach.ALL]


class LightningConfig(TrainerConfig):
    """``trainer=lightning``."""


class HFConfig(TrainerConfig):
    """``trainer=hf``."""


class LoggerConfig(Group):
    """``logger=...``."""

    role = Role.NEUTRAL


class WandbConfig(LoggerConfig):
    """``logger=wandb``."""

    mode: Literal["offline", "online", "disabled"]
    project: Text
    entity: str | None
    name: str | None
    tags: list[str]


class TensorBoardConfig(LoggerConfig):
    """``logger=tensorboard``."""

    mode: Literal["offline", "disabled"]


class CsvConfig(LoggerConfig):
    """``logger=csv``."""

    mode: Literal["offline", "disabled"]


class NoLoggerConfig(LoggerConfig):
    """``logger=none``."""

    mode: Literal["disabled"]


DEFAULT_TRAINER: Final = "apt_model.training.trainer.Trainer"
"""The ``_target_`` of ``trainer=default``."""

GROUPS: Final[dict[str, dict[str | None, type[Group]]]] = {
    "model": {"apt_model.gpt.GPT": GPTConfig},
    "moe": {"apt_model.layers.moe.MoE": MoEConfig},
    "align": {"apt_model.layers.align.BiStateAlignment": BiStateConfig},
    "voter": {"apt_model.layers.voter.EntropyVoter": VoterConfig},
    "schedule": {"apt_model.schedule.ScheduleRunner": ScheduleConfig},
    "data": {
        "apt_model.data.StdlibCorpus": StdlibConfig,
        "apt_model.data.TextCorpus": TextConfig,
        "apt_model.data.JsonlCorpus": JsonlConfig,
        "apt_model.data.HFCorpus": HFDatasetConfig,
        "apt_model.data.ShardsCorpus": ShardsConfig,
    },
    "optimizer": {"torch.optim.AdamW": AdamWConfig},
    "trainer": {
        DEFAULT_TRAINER: TrainerConfig,
        "apt_model.integrations.lightning.LightningTrainer": LightningConfig,
        "apt_model.integrations.transformers.HFTrainer": HFConfig,
    },
    "logger": {
        "apt_launch.tracking.wandb.WandbTracker": WandbConfig,
        "apt_launch.tracking.tensorboard.TensorBoardTracker": TensorBoardConfig,
        "apt_launch.tracking.csv.CsvTracker": CsvConfig,
        None: NoLoggerConfig,
    },
}


EXTRAS: Final[dict[type[Group], tuple[str, tuple[str, ...]]]] = {
    LightningConfig: ("lightning", ("lightning",)),
    HFConfig: ("hf", ("transformers", "accelerate")),
    TensorBoardConfig: ("tensorboard", ("tensorboard",)),
    HFDatasetConfig: ("hf", ("datasets",)),
}
"""Choices that need an extra of the package: its name, and the libraries that it brings."""


class TopLevel(Strict):
    """What stands beside the groups."""

    seed: Annotated[Seed, Role.FIXED]
    profile_file: Annotated[Text | None, Role.NEUTRAL]
    launch: Annotated[LaunchConfig, Role.NEUTRAL]


Mark = TypeVar("Mark", Role, Reach)


def _marks(kind: type[Mark], of_group: str) -> dict[str, Mark]:
    """Return what fields are marked with, and groups by their attribute ``of_group``: dotted keys and groups to marks."""
    of_schemas = [(name, getattr(schema, of_group)) for name, schemas in GROUPS.items() for schema in schemas.values()]
    found: dict[str, Mark] = {name: mark for name, mark in of_schemas if mark}
    places: list[tuple[str, type[Strict]]] = [("", TopLevel)]
    places += [(f"{name}.", schema) for name, schemas in GROUPS.items() for schema in schemas.values()]
    for prefix, schema in places:
        for name, field in schema.model_fields.items():
            found |= {f"{prefix}{field.alias or name}": mark for mark in field.metadata if isinstance(mark, kind)}
    return found


@cache
def roles() -> dict[str, Role]:
    """Return the role of each key and group that has one."""
    return _marks(Role, "role")


@cache
def reaches() -> dict[str, Reach]:
    """Return which updates each key and group changes that says so."""
    return _marks(Reach, "reach")


def _nearest_mark(key: str, known: Mapping[str, Mark]) -> Mark | None:
    """Return the mark of a dotted key: its own, or that of the key or the group that it belongs to."""
    while key not in known and "." in key:
        key = key.rpartition(".")[0]
    return known.get(key)


def role_of(key: str) -> Role | None:
    """Return the role of a dotted key: its own, or that of the key or the group that it belongs to."""
    return _nearest_mark(key, roles())


def reach_of(key: str) -> Reach:
    """Return which updates a dotted key changes: all of them, unless it is said; none, if it changes no result."""
    found = _nearest_mark(key, reaches())
    if found is None:
        return Reach.NONE if role_of(key) in (Role.NEUTRAL, Role.PROCESS) else Reach.ALL
    return found


def all_keys() -> list[str]:
    """Return every key that some config may have, in full."""
    keys = [*TopLevel.model_fields, *GROUPS, "profile", "hydra.run.dir", "hydra.sweep.dir", "hydra.verbose"]
    keys += [f"launch.{key}" for key in LaunchConfig.model_fields]
    keys += [
        f"hydra.launcher.{key}"
        for launcher in (LocalLauncherConfig, SlurmLauncherConfig)
        for key in launcher.model_fields
    ]
    for group, schemas in GROUPS.items():
        for schema in schemas.values():
            keys += [f"{group}.{key}" for key in _keys(schema)]
    return sorted(set(keys))


def _keys(schema: Any) -> list[str]:
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(field.alias or name)
        if "Anneal" in str(field.annotation):
            keys += [f"{name}.{inner.alias or key}" for key, inner in Anneal.model_fields.items()]
    return keys
