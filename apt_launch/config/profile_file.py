"""Older profile files, translated into overrides."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from apt_launch.config.yaml_file import load_yaml
from apt_launch.escapes import visible
from apt_launch.values import flatten
from apt_model.errors import ConfigError
from apt_model.files import in_home

KEYS = {
    "model.d_model": "model.d_model",
    "model.num_heads": "model.num_heads",
    "model.num_layers": "model.num_layers",
    "model.d_ff": "model.d_ff",
    "model.vocab_size": "model.vocab_size",
    "model.max_seq_len": "model.seq_len",
    "model.ffn_name": "model.ffn",
    "model.router_name": "moe.router",
    "model.attention_name": "model.attention",
    "model.moe.experts": "moe.num_experts",
    "model.moe.top_k": "moe.top_k",
    "model.moe.capacity": "moe.capacity_factor",
    "model.moe.balance_loss": "moe.balance_loss_weight",
    "model.bistate.alpha": "align.alpha",
    "model.bistate.beta": "align.beta",
    "model.bistate.tau_align": "align.tau",
    "model.voting.threshold": "voter.threshold",
    "model.voting.k": "voter.num_votes",
    "training.batch_size": "trainer.batch_size",
    "training.max_epochs": "trainer.max_epochs",
    "training.learning_rate": "optimizer.lr",
    "training.warmup_steps": "trainer.lr_schedule.warmup",
    "training.weight_decay": "optimizer.weight_decay",
    "training.gradient_clip": "trainer.grad_clip",
    "training.gradient_accumulation_steps": "trainer.accumulate",
    "training.mixed_precision": "trainer.precision",
    "training.save_freq": "trainer.checkpoint_every_epochs",
    "training.seed": "seed",
    "data.train_path": "data.train_path",
    "data.val_path": "data.val_path",
    "data.text_key": "data.text_key",
}
"""What an older key is called now. Everything below ``schedules`` keeps its name, under ``schedule``."""

IMPLEMENTATIONS = {
    "model.attention_name": {"sdpa", "eager"},
    "model.ffn_name": {"swiglu", "gelu", "relu2"},
    "model.router_name": {"softmax", "sigmoid"},
}
"""Names of implementations that exist here, too; older names for others are not used, and that is said."""


def with_profile_file(arguments: list[str]) -> list[str]:
    """Put the overrides that ``profile_file=PATH`` stands for before those of the command line, which win."""
    given = [argument for argument in arguments if argument.lstrip("+").startswith("profile_file=")]
    path = given[-1].split("=", 1)[1] if given else ""
    if path in ("", "null"):
        return arguments
    chosen = {argument.split("=", 1)[0] for argument in arguments if "=" in argument and not argument.startswith("-")}
    overrides, unused = read_profile(in_home(path.strip("'\""), "profile_file"), chosen)
    if unused:
        sys.stderr.write(f"profile_file: not used: {visible(', '.join(unused))}\n")
    first = next((i for i, argument in enumerate(arguments) if "=" in argument and not argument.startswith("-")), 0)
    return [*arguments[:first], *overrides, *arguments[first:]]


def read_profile(path: Path, chosen: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Translate the profile at ``path``.

    Args:
        chosen: groups that the command line chooses itself; what the file says of them is not used.

    Returns:
        overrides in Hydra's grammar, and the file's keys that are not used.

    Raises:
        ConfigError: the file is missing or no mapping of sections.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _, loaded = load_yaml(path, "profile_file")  # not plain YAML: 3e-5 is a number
    try:
        content = cast("dict[str, Any]", OmegaConf.to_container(loaded))
    except OmegaConfBaseException as error:
        raise ConfigError(f"profile_file: {path} is not a config: {str(error).splitlines()[0]}") from None

    taken = set(chosen)
    overrides, unused = [], []
    schedules = content.pop("schedules", None)
    flat = flatten(content)
    if "data.train_path" in flat and "data" not in taken:
        overrides.append("data=jsonl")
    for key, value in flat.items():
        name = KEYS.get(key)
        group = name.split(".")[0] if name else ""
        foreign = key in IMPLEMENTATIONS and not (isinstance(value, str) and value in IMPLEMENTATIONS[key])
        if key == "training.mixed_precision" and not isinstance(value, bool):
            foreign = True
        if name is None or group in taken or foreign or value is None:
            unused.append(key)
            continue
        if key == "training.mixed_precision":
            value = "auto" if value else "fp32"
        overrides.append(f"{name}={_quoted(value)}")
    if isinstance(schedules, Mapping) and "schedule" not in taken:
        overrides += ["schedule=none", *_schedule_overrides(schedules)]
    elif schedules is not None:
        unused += [f"schedules.{key}" for key in schedules] if isinstance(schedules, Mapping) else ["schedules"]
    if flat.get("training.max_epochs") is not None and "trainer" not in taken:
        overrides.append("trainer.max_batches_per_epoch=null")
    return overrides, unused


def _schedule_overrides(schedules: Mapping[str, Any]) -> list[str]:
    """Replace whole anneals, so that what the file leaves out has its default and not another profile's value."""
    return [f"++schedule.{key}={_quoted(value)}" for key, value in schedules.items()]


def _quoted(value: Any) -> str:
    """Return ``value`` in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_quoted(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_quoted(item) for item in value) + "]"
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
