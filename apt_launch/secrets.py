"""Secrets: found in configs and in text, so that none is written to a folder, to W&B or to a job script."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

from apt_model.errors import ConfigError

SECRET_NAME: Final = re.compile(
    r"(^|[_.\-])(password|passwd|passphrase|secrets?|(auth|access|bearer|hf)?_?token|api_?key|access_?key|private_?key|"
    r"secret_?key|credentials?)($|[_.\-=])",
    re.IGNORECASE,
)
SECRET_VALUE: Final = re.compile(
    r"\b(sk-[\w-]{20,}|hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}|"
    r"AKIA[0-9A-Z]{16}|wandb_v1_\w{20,}|AIza[\w-]{30,}|ey[\w-]{15,}\.ey[\w-]{15,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s:@]+:[^/\s@]+@"
)
PRECISE_NAME: Final = re.compile(
    r"(password|passwd|passphrase|(^|[_-])pwd|secret|(api|access|private|secret|account)[_-]?key|(^|[_-])credential|"
    r"(^|[_-])(auth|access|bearer|api|hf|hub|bot|refresh|session|github|gitlab|slack|wandb)[_-]?token)s?$",
    re.IGNORECASE,
)
"""Last parts of keys of other people's configs, in snake case: ``pad_token`` and ``password_file`` are none."""
SECTIONS: Final = ("secrets", "passwords", "credentials")
"""Parts of configs whose values are all secrets."""
TOKEN: Final = re.compile(r"(?=[^\d]*\d)[\w~+/=.-]{12,}|[\w~+/=.-]{20,}")
"""A value that, under another name that ends in ``token``, is no word of a vocabulary."""
ASSIGNMENT: Final = re.compile(r"([\w.-]+)[\"']?\s*[=:]\s*[\"']?(?![\"'\s$]|os\.|None|null)[^\"'\s]{6,}")
SHORTEST_SECRET: Final = 8


REMEDY: Final = (
    "A config is written to the run's folder, to W&B and to job scripts. Set secrets in the environment of the process that "
    "needs them."
)


class SecretError(Exception):
    """A config asks the environment for a secret."""


def secret_error(error: BaseException | None) -> SecretError | None:
    """Return the SecretError that OmegaConf has wrapped in ``error``, if there is one."""
    while error is not None and not isinstance(error, SecretError):
        error = error.__cause__ or error.__context__
    return error


def refuse_secrets_of_the_environment(is_known_later: Callable[[str], bool] | None = None) -> None:
    """Have ``${oc.env:NAME}`` raise SecretError from now on where NAME is named like a secret, however it is written.

    Args:
        is_known_later: says of a name whether it has no value yet, with a default or without: LookupError.
    """
    from omegaconf.resolvers import oc

    def env(key: str, *default: Any) -> Any:
        if SECRET_NAME.search(str(key)):
            raise SecretError(f"it takes the secret {key} from the environment. {REMEDY}")
        if is_known_later is not None and is_known_later(str(key)):
            raise LookupError(f"{key} has its value in a job alone")
        return oc.env(key, *default)

    register_resolver("oc.env", env)


def register_resolver(name: str, resolver: Callable[..., Any]) -> None:
    """Register a resolver in place of another, in OmegaConf 2.3 and in 2.4, where that has another name."""
    import omegaconf
    from omegaconf import OmegaConf

    new = tuple(map(int, omegaconf.__version__.split(".")[:2])) >= (2, 4)
    register: Any = OmegaConf.register_resolver if new else OmegaConf.register_new_resolver
    register(name, resolver, replace=True)


@contextmanager
def without_secrets_of_the_environment(is_known_later: Callable[[str], bool] | None = None) -> Iterator[None]:
    """Refuse them meanwhile, in a process whose other configs are not ours; see :func:`refuse_secrets_of_the_environment`."""
    from omegaconf.basecontainer import BaseContainer

    before = BaseContainer._resolvers["oc.env"]
    refuse_secrets_of_the_environment(is_known_later)
    try:
        yield
    finally:
        BaseContainer._resolvers["oc.env"] = before


def keep_private() -> None:
    """Let only this user read what the process writes from now on: configs, logs, job scripts, W&B's files."""
    os.umask(0o077)


def current_umask() -> int:
    """Return the mode that files of this process lack."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


@contextmanager
def kept_private() -> Iterator[None]:
    """Do so meanwhile, in a process that goes on to be somebody else's."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def is_named_secret(key: str, value: object) -> bool:
    """Return whether somebody else's config has a secret under ``key`` in clear, as far as its name says.

    Interpolations are none, nor are files that are there.
    """
    if value is None or isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    is_named, is_token = _as_named(key)
    text = str(value)
    if not (is_named or (is_token and TOKEN.fullmatch(text))):
        return False
    return bool(text.strip()) and text != "???" and "${" not in text and not _is_file(text)


@cache
def _as_named(key: str) -> tuple[bool, bool]:
    """Return whether ``key`` names a secret, and whether it names a token, which may be a word."""
    parts = [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part) for part in key.split(".") if not part.isdecimal()]
    last = parts[-1] if parts else ""
    is_named = PRECISE_NAME.search(last) is not None or any(part.lower() in SECTIONS for part in parts[:-1])
    return is_named, last.lower().endswith("token")


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def check_secrets(values: Mapping[str, Any]) -> None:
    """Make sure that no value is a secret: a config ends in the run's folder, in W&B and in job scripts.

    Raises:
        ConfigError: with every problem found, and without the secrets.
    """
    problems = list(secret_problems(values, ""))
    if problems:
        raise ConfigError(*problems)


def secrets_of_the_environment() -> dict[str, str]:
    """Return the variables that are named like secrets, and long enough to be found elsewhere by their value."""
    return {
        name: value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET
    }


def without_values_of_the_environment(text: str) -> str:
    """Return ``text`` with interpolations where secrets of the environment stand in clear."""
    for name, secret in secrets_of_the_environment().items():
        text = text.replace(secret, f"${{oc.env:{name}}}")
    return text


def secret_problems(values: Any, path: str) -> list[str]:
    """Return what is wrong with the values below the key ``path``: each that is, or names, a secret."""
    return secret_leaves(leaves(values, path))


def secret_leaves(found: Iterable[tuple[str, Any]]) -> list[str]:
    """Return what is wrong with values, each with its full key; see :func:`secret_problems`."""
    known = secrets_of_the_environment()
    problems = []
    for key, value in found:
        reason = _reason(key, value, known)
        if reason:
            problems.append(f"{key}: {reason}. {REMEDY}")
    return problems


def _reason(key: str, value: Any, known: Mapping[str, str]) -> str | None:
    if value is None or value == "" or str(value) == "???":
        return None
    if SECRET_NAME.search(key.rsplit(".", 1)[-1]) and isinstance(value, str):
        return "by its name it holds a secret"
    if not isinstance(value, str):
        return None
    if SECRET_VALUE.search(value) or _assigns_a_secret(value):
        return "its value looks like a secret"
    for named in re.finditer(r"oc\.env\s*:([^},]+)", value):
        variable = re.sub(r"[\s'\"\\]", "", named.group(1))
        if SECRET_NAME.search(variable):
            return f"it takes the secret {variable} from the environment"
    name = next((name for name, secret in known.items() if secret in value), None)
    return f"it has the value of the environment's {name}" if name else None


def _assigns_a_secret(text: str) -> bool:
    return any(SECRET_NAME.search(match.group(1)) for match in ASSIGNMENT.finditer(text))


def leaves(values: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the values at and below the key ``path``, each with its key."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from leaves(value, f"{path}.{number}" if path else str(number))
    else:
        yield path, values


def redacted(text: str) -> str:
    """Return ``text`` without the lines that look like they hold a secret."""
    known = secrets_of_the_environment().values()

    def clean(line: str) -> str:
        hidden = SECRET_VALUE.search(line) or _assigns_a_secret(line) or any(secret in line for secret in known)
        return "[a line that looks like it holds a secret]" if hidden else line

    return "\n".join(map(clean, text.split("\n")))
