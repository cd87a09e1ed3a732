"""What every group of ``conf/`` may hold: keys, types, domains, roles. It is also the allow-list of ``_target_``.

Torch stays unloaded: a config is judged before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import ConfigDict, Field

from apt_launch.sweep.options import LaunchConfig as LaunchConfig
from apt_launch.sweep.options import LocalLauncherConfig, NotNegative, SlurmLauncherConfig, Text
from apt_model.data.borders import Pack
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


class LinearScalingConfig(Strict):
    """``model.rope_scaling`` with ``rope_type: linear``."""

    rope_type: Literal["linear"]
    factor: PositiveNumber


class Llama3ScalingConfig(Strict):
    """``model.rope_scaling`` with ``rope_type: llama3``."""

    rope_type: Literal["llama3"]
    factor: PositiveNumber
    low_freq_factor: PositiveNumber
    high_freq_factor: PositiveNumber
    original_max_position_embeddings: Positive


class GPTConfig(Group):
    """``model=gpt``. The defaults are what runs of earlier versions had."""

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
    z_loss_weight: NotNegative = 0.0
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    tie_embeddings: bool = True
    rope_theta: PositiveNumber = 10_000.0
    rope_scaling: Annotated[LinearScalingConfig | Llama3ScalingConfig, Field(discriminator="rope_type")] | None = None
    norm_eps: PositiveNumber | None = None
    qk_norm: Literal["head", "all"] | None = None
    qkv_bias: bool = False
    sliding_window: Positive | None = None


class PretrainedConfig(GPTConfig):
    """``model=pretrained``, once :mod:`apt_launch.config.pretrained` has filled it in."""

    path: Annotated[Text, Role.NEUTRAL]  # whose weights they are, ``weights`` says
    revision: Annotated[Text | None, Role.NEUTRAL] = None
    weights: Text
    max_seq_len: Positive
    sparse: bool = False


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
    balance_scope: Literal["global", "micro"] = "micro"  # what runs of earlier versions had
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
    trains: Literal["projection", "all"] = "all"  # what runs of earlier versions had


class VoterConfig(Group):
    """``voter=entropy``."""

    reach = Reach.VOTER

    threshold: NotNegative
    num_votes: Positive
    dropout: BelowOne
    draws: Literal["opposite", "independent"] = "independent"  # what runs of earlier versions had


class ScheduleConfig(Group, Curriculum):
    """``schedule=...``."""

    reach = Reach.SCHEDULED

    on_horizon_change: Annotated[Literal["error", "rescale", "keep_absolute"], Role.NEUTRAL] = "error"


class _DocumentsConfig(Group):
    """Documents of text: what makes tokens of them. The defaults are what runs of earlier versions had."""

    role = Role.FIXED

    pack: Pack | None = None
    tokenizer: Text | None = None
    bos: bool | None = None
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
    pack: Pack | None = None


class AdamWConfig(Group):
    """``optimizer=adamw``."""

    target: Annotated[str | None, Role.FIXED] = Field(alias="_target_")
    lr: Annotated[PositiveNumber, Reach.SCHEDULED]
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)]
    eps: PositiveNumber
    weight_decay: NotNegative
    fused: bool


class SGDConfig(Group):
    """``optimizer=sgd``."""

    target: Annotated[str | None, Role.FIXED] = Field(alias="_target_")
    lr: PositiveNumber
    momentum: BelowOne
    dampening: BelowOne
    nesterov: bool
    weight_decay: NotNegative
    fused: bool


class AdafactorConfig(Group):
    """``optimizer=adafactor``."""

    target: Annotated[str | None, Role.FIXED] = Field(alias="_target_")
    lr: PositiveNumber
    beta2_decay: Annotated[float, Field(lt=0, allow_inf_nan=False)]
    eps: Annotated[list[PositiveNumber | None], Field(min_length=2, max_length=2)]
    d: PositiveNumber
    weight_decay: NotNegative


class MuonConfig(Group):
    """``optimizer=muon``."""

    target: Annotated[str | None, Role.FIXED] = Field(alias="_target_")
    lr: PositiveNumber
    weight_decay: NotNegative
    momentum: BelowOne
    nesterov: bool
    ns_steps: Positive
    adjust: Literal["match_rms_adamw", "original"]
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)]
    eps: PositiveNumber


class ProfileConfig(Strict):
    """``trainer.profile``."""

    at: Annotated[int, Field(ge=0)]
    steps: Positive


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
    qk_clip: PositiveNumber | None = None
    lr_schedule: Annotated[Anneal | None, Reach.SCHEDULED]
    ema: BetweenZeroAndOne | None = None  # runs of earlier versions have no such key, nor the next
    init_from: Annotated[Text | None, Role.FIXED] = None
    resume: Annotated[Text | None, Role.PROCESS]
    log_every: Annotated[Positive, Role.NEUTRAL, Reach.ALL]
    validation_batches: Positive | None
    checkpoint_every_epochs: Annotated[Positive, Role.NEUTRAL]
    checkpoint_every_minutes: Annotated[PositiveNumber | None, Role.NEUTRAL]
    keep_last: Annotated[Positive, Role.PROCESS]
    keep_best: Annotated[int, Field(ge=0), Role.PROCESS]
    keep_every: Annotated[Positive | None, Role.PROCESS]
    on_nonfinite: Literal["stop", "skip", "rollback"]
    profile: Annotated[ProfileConfig | None, Role.PROCESS] = None
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


class ModelsLossConfig(Group):
    """``loss=cross_entropy``."""


class NoLoggerConfig(LoggerConfig):
    """``logger=none``."""

    mode: Literal["disabled"]


DEFAULT_TRAINER: Final = "apt_model.training.trainer.Trainer"
"""The ``_target_`` of ``trainer=default``."""


class Own(Group):
    """A class or function of a package that the user allows, or of torch's: its other keys are its own parameters."""

    model_config = ConfigDict(**{**Strict.model_config, "extra": "allow"})


class OwnModelConfig(Own):
    """``model=own``."""

    role = Role.FIXED

    seq_len: Positive
    vocab_size: Positive | None = None


class TransformersConfig(OwnModelConfig):
    """``model=transformers``."""

    model_config = Strict.model_config

    path: Text | None
    config: dict[str, Any] | None
    experts: bool


class OwnDataConfig(Own):
    """``data=own``."""

    role = Role.FIXED

    pack: Pack | None = None


class OwnOptimizerConfig(Own):
    """``optimizer=own``, ``sgd`` and others of torch's."""

    target: Annotated[str | None, Role.FIXED] = Field(alias="_target_")
    lr: PositiveNumber
    weight_decay: NotNegative = 0.0


class OwnLossConfig(Own):
    """``loss=own``."""


class OwnLoggerConfig(Own):
    """``logger=own``."""

    role = Role.NEUTRAL

    mode: Literal["offline", "disabled"] = "offline"


OWN: Final[dict[str, type[Own]]] = {
    "model": OwnModelConfig,
    "data": OwnDataConfig,
    "optimizer": OwnOptimizerConfig,
    "logger": OwnLoggerConfig,
    "loss": OwnLossConfig,
}
"""Groups whose class may be the user's own."""

OF_OWN: Final = frozenset(key for kind in OWN.values() for key in kind.model_fields)
"""Keys of these groups that the launcher reads; a class is given them where it takes them."""

INJECTED: Final[dict[str, tuple[str, ...]]] = {
    "model": ("moe", "align", "voter"),
    "data": ("split",),
    "optimizer": ("params",),
    "logger": ("folder", "config", "identity"),
    "loss": ("logits", "targets", "hidden"),
}
"""Parameters that the launcher gives to a class of these groups, where it takes them."""

GROUPS: Final[dict[str, dict[str | None, type[Group]]]] = {
    "model": {
        "apt_model.gpt.GPT": GPTConfig,
        "apt_model.layouts.pretrained.PretrainedGPT": PretrainedConfig,
        "apt_model.integrations.transformers.causal_lm": TransformersConfig,
    },
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
    "optimizer": {
        "torch.optim.AdamW": AdamWConfig,
        "torch.optim.SGD": SGDConfig,
        "torch.optim.Adafactor": AdafactorConfig,
        "apt_model.training.muon.Muon": MuonConfig,
    },
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
    "loss": {None: ModelsLossConfig},
}


EXTRAS: Final[dict[type[Group], tuple[str, tuple[str, ...]]]] = {
    LightningConfig: ("lightning", ("lightning",)),
    HFConfig: ("hf", ("transformers", "accelerate")),
    TransformersConfig: ("hf", ("transformers", "accelerate")),
    TensorBoardConfig: ("tensorboard", ("tensorboard",)),
    HFDatasetConfig: ("hf", ("datasets",)),
}
"""Choices that need an extra of the package: its name, and the libraries that it brings."""


NEW: Final[dict[str, Any]] = {"loss": {"_target_": None}, "callbacks": {}}
"""What configs of earlier versions do not have; at these values it is no part of a run's identity either."""

NEW_KEYS: Final[dict[str, Any]] = {
    **{"trainer.init_from": None, "trainer.ema": None, "data.bos": None, "data.pack": None},
    **{"moe.balance_scope": "micro", "model.z_loss_weight": 0.0, "trainer.qk_clip": None},
    **{"align.trains": "all", "voter.draws": "independent"},
    "trainer.lr_schedule.cooldown": 0,
    **{"model.num_kv_heads": None, "model.head_dim": None, "model.tie_embeddings": True},
    **{"model.rope_theta": 10000.0, "model.rope_scaling": None, "model.norm_eps": None},
    **{"model.qk_norm": None, "model.qkv_bias": False, "model.sliding_window": None, "model.sparse": False},
}
"""The same, of single keys."""


class TopLevel(Strict):
    """What stands beside the groups."""

    seed: Annotated[Seed, Role.FIXED]
    profile_file: Annotated[Text | None, Role.NEUTRAL]
    callbacks: dict[str, dict[str, Any]] = Field(default_factory=dict)
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
