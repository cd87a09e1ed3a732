"""``model=pretrained``: what a config leaves to the model's folder, filled in before anything else is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from apt_launch.config.instantiate import PRETRAINED
from apt_model.errors import ConfigError
from apt_model.layouts.folder import WeightsFolder
from apt_model.layouts.source import locate

OF_THE_FOLDER: Final = ("num_experts", "top_k", "granularity", "router", "shared_expert")
"""What ``moe=pretrained`` leaves to the folder."""


def with_pretrained(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose groups ``model``, ``moe`` and ``data`` say what the model's folder says; others as they are.

    A config that was filled in before, in the plan of a sweep or a run's folder, asks no folder.

    Raises:
        ConfigError: there is no such folder, its model has no counterpart here, or a value contradicts it.
    """
    model, moe = values.get("model"), values.get("moe")
    to_fill = isinstance(moe, Mapping) and any(moe.get(name, 0) is None for name in OF_THE_FOLDER)
    if not isinstance(model, Mapping) or model.get("_target_") != PRETRAINED or model.get("weights") is not None:
        if to_fill:
            raise ConfigError("moe=pretrained: only model=pretrained brings experts. Choose moe=experts.")
        return values
    path, revision = model.get("path"), model.get("revision")
    if not isinstance(path, str) or not path or not isinstance(revision, str | None):
        raise ConfigError(f"model.path: {path!r} is no folder. Name one: model.path=DIR.")
    folder = WeightsFolder(locate(path, revision))
    experts = folder.architecture.experts
    said = {**folder.architecture.values(), "sparse": experts is not None}
    of_experts = {} if experts is None else experts.values()
    problems = [
        f"{group}.{name} = {given[name]!r}: the model in {folder.path} has {value!r}. {remedy}"
        for group, given, found, remedy in (
            ("model", model, said, "Leave it null."),
            ("moe", moe if isinstance(moe, Mapping) else {}, of_experts, "Choose moe=pretrained, and leave it null."),
        )
        for name, value in found.items()
        if given.get(name) is not None and given[name] != value
    ]
    if experts is None and to_fill:
        problems.append(f"moe=pretrained: the model in {folder.path} has no experts. Choose moe=experts.")
    longest, seq_len = said["max_seq_len"], model.get("seq_len")
    if isinstance(seq_len, int) and seq_len > longest:
        problems.append(
            f"model.seq_len = {seq_len}: the model in {folder.path} is meant for {longest} tokens at the most."
        )
    if problems:
        raise ConfigError(*problems)
    folder.pieces  # noqa: B018 - says what of the weights is missing or has no counterpart
    found = {**values, "model": {**model, **said, "weights": folder.fingerprint}}
    if isinstance(moe, Mapping):
        found["moe"] = {**moe, **of_experts}
    if isinstance(values.get("data"), Mapping):
        found["data"] = with_tokenizer(values["data"], folder)
    return found


def with_tokenizer(data: Mapping[str, Any], folder: WeightsFolder) -> dict[str, Any]:
    """Return the group ``data`` with the model's own tokenizer, unless it names another one or has none to choose."""
    from apt_model.data.tokenizer import FILE_NAME, find_tokenizer, load_tokenizer
    from apt_model.files import in_home

    found = dict(data)
    if "tokenizer" in found and found["tokenizer"] is None:
        if not (folder.path / FILE_NAME).is_file():
            raise ConfigError(
                f"data.tokenizer: {folder.path} has no {FILE_NAME}. Name the model's: data.tokenizer=FILE. Or let transformers "
                "make it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )
        found["tokenizer"] = str(folder.path / FILE_NAME)
    if isinstance(found.get("tokenizer"), str) and "bos" in found and found["bos"] is None:
        file = find_tokenizer(in_home(found["tokenizer"], "data.tokenizer"))
        found["bos"] = load_tokenizer(file).begin is not None
    return found
