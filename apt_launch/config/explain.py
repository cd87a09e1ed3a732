"""Hydra's errors in the project's words: what is wrong, where, and the nearest valid names."""

from __future__ import annotations

import re
import shlex
from typing import Any, cast

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from apt_launch.commands import override
from apt_launch.config.menu import CONF, groups, options_below
from apt_launch.config.schema import all_keys
from apt_launch.values import flatten
from apt_model.errors import CheckpointError, ConfigError, nearest


def _why_unread(error: OverrideParseException) -> str:
    """Return why Hydra's grammar has no place for an override, and how it is written if its value is meant as text."""
    key, separator, value = error.override.partition("=")
    reason = str(error).splitlines()[0].rstrip(".")
    if "LexerNoViableAlt" in reason:
        reason = "it has a character that stands within quotation marks alone"
    if not separator or not value:
        return f"{reason}."
    return f"{reason}. If its value is text, quote it: {shlex.quote(override(key, value))}"


def explained(error: Exception) -> ConfigError:
    """Return ``error``, raised while composing a config, as a ConfigError."""
    if isinstance(error, ConfigError):
        return error
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        wanted = str(error.missing_cfg_file)
        group, _, option = wanted.rpartition("/")
        options = [
            one for one in error.options or [] if not one.startswith("apt_")
        ]  # local and slurm are the same here
        return ConfigError(f"{group or 'config'}: there is no option {option!r}. {nearest(option, options)}")
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override}: not an override that Hydra understands: {_why_unread(error)}")
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1).split("@")[0]
        if "No match in the defaults list" in text:
            return ConfigError(f"{key}: there is no such group here. {nearest(key, [*all_keys(), *groups()])}")
        cause = str(error.__cause__ or "").splitlines()
        if cause and "not in struct" not in cause[0]:
            return ConfigError(f"{key}: {cause[0]}")
        if options := _options_with(key):
            group = key.split(".")[0]
            return ConfigError(
                f"{key}: the chosen option of {group!r} has no such key, but {group}={f' or {group}='.join(options)} has."
            )
        known = all_keys()
        inner = re.search(r"full_key: (\S+)", str(error.__cause__))
        if inner and inner.group(1) != key and key in known:  # a whole mapping, of which it has no entries
            return ConfigError(f"{key}: its entries are added one by one: +{inner.group(1)}=...")
        if choices := options_below(key):
            return ConfigError(
                f"{key}: only {', '.join(choices)} list this key. Choose one of them, or write ++ before it, which sets it "
                f"with each: ++{key}=..."
            )
        if key in known:
            return ConfigError(f"{key}: conf/ does not list this key. Write + before it to add it: +{key}=...")
        return ConfigError(f"{key}: unknown key. {nearest(key, [*known, *groups()] if '/' in key else known)}")
    while not text.strip() and error.__cause__ is not None:  # Hydra wraps what OmegaConf says in an error without words
        error = error.__cause__  # type: ignore[assignment]
        text = ": ".join(filter(None, (getattr(error, "full_key", None), (str(error).splitlines() or [""])[0])))
    return ConfigError(text.strip() or f"the config cannot be composed ({type(error).__name__}).")


def _options_with(key: str) -> list[str]:
    """Return the options of the key's group whose YAML has the key."""
    group, _, rest = key.partition(".")
    options = []
    for path in sorted((CONF / group).glob("*.yaml")):
        keys = flatten(cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(path))))
        if rest in keys:
            options.append(path.stem)
    return options


def understood(error: BaseException) -> ConfigError | None:
    """Return ``error`` as a ConfigError if it is about what was asked for, also where Hydra failed on it; else None."""
    if isinstance(error, ConfigError | HydraException | OmegaConfBaseException):
        return explained(error)
    if isinstance(error, CheckpointError):
        return ConfigError(str(error))
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""
    if not module.startswith(("hydra.", "omegaconf.", "antlr4.")):
        return None
    if isinstance(error, ValueError):  # in words for users: flags that exclude each other, for instance
        return ConfigError(str(error))
    return ConfigError(
        f"the overrides mean nothing to Hydra ({type(error).__name__}: {str(error).strip() or 'no more is known'}). A group "
        "takes the name of an option (model=gpt), a key takes a value (model.d_model=64)."
    )
