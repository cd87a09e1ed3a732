"""What every group of ``conf/`` may hold: keys, types, domains. It is also the allow-list of ``_target_``.

Torch stays unloaded: a config is judged before anything heavy is imported.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from apt_launch.sweep.options import LaunchConfig as LaunchConfig
from apt_launch.sweep.options import LocalLauncherConfig, SlurmLauncherConfig
from apt_model.schedule import Anneal, Curriculum
from apt_model.schedule.fields import Positive, PositiveNumber, Strict

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
BetweenZeroAndOne = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class Group(Strict):
    """A group's config: ``_target_`` names the class, the other keys are its parameters."""

    target: str | None = Field(alias="_target_")


class GPTConfig(Group):
    """``model=gpt``."""

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

    num_experts: Annotated[int, Field(ge=2)]
    top_k: Positive
    granularity: Positive
    upcycling: Literal["copy", "noise", "drop"]
    upcycling_share: PositiveNumber | None
    capacity_factor: PositiveNumber | None
    overflow: Literal["reroute", "drop"] = "drop"  # the default is what runs of earlier versions had
    temperature: PositiveNumber
    router: Literal["softmax", "sigmoid"]
    balance_loss_weight: NotNegative
    z_loss_weight: NotNegative
    bias_update_rate: NotNegative
    jitter: BelowOne
    shared_expert: bool


class BiStateConfig(Group):
    """``align=bistate``."""

    rank: Positive
    alpha: Share
    beta: Share
    tau: PositiveNumber
    weight: NotNegative


class VoterConfig(Group):
    """``voter=entropy``."""

    threshold: NotNegative
    num_votes: Positive
    dropout: BelowOne


class ScheduleConfig(Group, Curriculum):
    """``schedule=...``."""


class _DocumentsConfig(Group):
    """Documents of text: what makes tokens of them. The defaults are what runs of earlier versions had."""

    tokenizer: Text | None = None
    cache: Text | None = None


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

    path: Text
    verify: bool


class AdamWConfig(Group):
    """``optimizer=adamw``."""

    lr: PositiveNumber
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)]
    eps: PositiveNumber
    weight_decay: NotNegative
    fused: bool


class TrainerConfig(Group):
    """``trainer=default``."""

    max_epochs: Positive
    max_batches_per_epoch: Positive | None
    batch_size: Positive
    accumulate: Positive
    parallel: Literal["ddp", "fsdp"]
    expert_parallel: Positive
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    compile: bool = False
    activation_checkpointing: bool = False
    grad_clip: PositiveNumber | None
    lr_schedule: Anneal | None
    resume: Text | None
    log_every: Positive
    validation_batches: Positive | None
    checkpoint_every_epochs: Positive
    checkpoint_every_minutes: PositiveNumber | None
    keep_last: Positive
    keep_best: Annotated[int, Field(ge=0)]
    keep_every: Positive | None
    on_nonfinite: Literal["stop", "skip", "rollback"]
    stall_minutes: PositiveNumber | None
    keep_freed_memory: bool
    onednn_products: bool


class LightningConfig(TrainerConfig):
    """``trainer=lightning``."""


class HFConfig(TrainerConfig):
    """``trainer=hf``."""


class WandbConfig(Group):
    """``logger=wandb``."""

    mode: Literal["offline", "online", "disabled"]
    project: Text
    entity: str | None
    name: str | None
    tags: list[str]


class TensorBoardConfig(Group):
    """``logger=tensorboard``."""

    mode: Literal["offline", "disabled"]


class CsvConfig(Group):
    """``logger=csv``."""

    mode: Literal["offline", "disabled"]


class NoLoggerConfig(Group):
    """``logger=none``."""

    mode: Literal["disabled"]


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
        "apt_model.training.trainer.Trainer": TrainerConfig,
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

    seed: Seed
    profile_file: Text | None
    launch: LaunchConfig


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
