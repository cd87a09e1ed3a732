"""A composed config of any program as plain values, and back: what was resolved stays so, and keeps its types.

A frozen value is one of YAML's. ``$``-names stand for what YAML has not, each a mapping with that one key: ``$pairs`` a mapping
whose keys are no plain words, ``$path``, ``$bytes``, ``$enum``. Strings are in OmegaConf's syntax. An interpolation stays one if
it asks for a secret of the environment, if it has no value before the job runs, or a value that is not plain. A secret that
stands in the config in clear is one number in ``${apt.secret:0}``, and what is built of it stays an interpolation, too.
"""

from __future__ import annotations

import base64
import enum
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from apt_launch.secrets import (
    SECRET_VALUE,
    is_named_secret,
    register_resolver,
    secrets_of_the_environment,
    without_secrets_of_the_environment,
)
from apt_model.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

TYPES: Final = "$types"
"""The key beside a config's own with the types of its structured nodes: pairs of a dotted key and ``module:class``."""

MISSING: Final = "???"

LAZY: Final = frozenset({"hydra.job.override_dirname"})
"""Interpolations of Hydra's that warn when they are resolved; nobody's config need ask for them."""

OF_JOBS: Final = frozenset({"overrides", "job", "launcher"})
"""Keys of Hydra's node whose values may differ from job to job."""

OVERRIDES: Final = "hydra.overrides."
"""Where Hydra keeps overrides as they were written."""

SECRET: Final = "apt.secret"
"""The resolver that is none: its interpolations stand for secrets until a job begins."""

_NUMBER: Final = re.compile(rf"\$\{{{re.escape(SECRET)}:(\d+)\}}")
_NO_VALUE = object()


class Freezer:
    """Freezes configs; those of one sweep share what is the same in all of them."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        """Secrets of the configs, by the numbers that stand for them."""
        self._in_clear: list[Any] = []  # nodes with such secrets, in the config that is being frozen
        self._problems: list[str] = []
        self._at = ""  # the key whose interpolation is being resolved
        self._set_by_hydra: frozenset[str] = frozenset()  # variables that jobs have of the config
        self._secrets = {value: name for name, value in secrets_of_the_environment().items()}
        self._hydras = [_HydraNode(None), _HydraNode(None)]  # as it is, and with numbers for secrets

    def freeze(self, cfg: DictConfig) -> dict[str, Any]:
        """Return the values of ``cfg``, with the key :data:`TYPES`.

        Raises:
            ConfigError: a value is a secret.
        """
        values, types = self._values(cfg, 0)
        if self._in_clear:
            with self._numbered(self._in_clear):
                values, types = self._values(cfg, 1)
        if self._problems:
            raise ConfigError(*self._problems)
        values[TYPES] = [[key, types[key]] for key in sorted(types)]
        return values

    def _values(self, cfg: DictConfig, which: int) -> tuple[dict[str, Any], dict[str, str]]:
        types: dict[str, str] = {}
        self._in_clear, self._problems = [], []
        if self._hydras[which].of is not cfg:
            self._hydras[which] = _HydraNode(cfg)
        self._hydra = self._hydras[which]
        self._set_by_hydra = _variables(cfg)
        with without_secrets_of_the_environment(self._is_known_later), _without_what_only_jobs_know():
            values: dict[str, Any] = self._container(cfg, "", types, {})
        return values, types

    @contextmanager
    def _numbered(self, nodes: list[Any]) -> Iterator[None]:
        """Have these nodes be interpolations without a value meanwhile, and so all that is built of them."""
        from omegaconf import flag_override

        before = [(node, node._value()) for node in nodes]
        try:
            for node, value in before:
                known = (number for number, one in self.kept.items() if one == value and type(one) is type(value))
                number = next(known, str(len(self.kept)))
                self.kept[number] = value
                with flag_override(node, "readonly", False):
                    node._set_value(f"${{{SECRET}:{number}}}")
            yield
        finally:
            for node, value in before:
                with flag_override(node, "readonly", False):
                    node._set_value(value)

    def clean(self, text: str) -> str:
        """Return ``text`` with interpolations where secrets of the environment stood in clear."""
        for secret, name in self._secrets.items():
            if secret in text:
                text = text.replace(secret, f"${{oc.env:{name}}}")
        return text

    def _container(self, node: Any, path: str, types: dict[str, str], above: Mapping[int, Any]) -> Any:
        from omegaconf import DictConfig

        if id(node) in above:
            raise ConfigError(f"{path}: it holds itself, by its interpolations. Break the circle.")
        above = {**above, id(node): None}
        if not isinstance(node, DictConfig):
            return [self._child(node, number, f"{path}.{number}", types, above) for number in range(len(node))]
        kind = node._metadata.object_type
        if isinstance(kind, type) and not issubclass(kind, dict) and (name := _name_of(kind)) is not None:
            types[path] = name
        keys = list(node)
        plain = all(isinstance(key, str) and key and "." not in key and not key.startswith("$") for key in keys)
        if path == "hydra" and self._hydra.is_alike:
            return self._of_hydra(node, types, above)
        values = [self._child(node, key, f"{path}.{key}" if path else str(key), types, above) for key in keys]
        if plain:
            return dict(zip(keys, values, strict=True))
        pairs = [[self._leaf(k, path), v] for k, v in zip(keys, values, strict=True)]
        if not path and "hydra" in keys:  # which is looked for by its name
            return {"$pairs": [pair for pair in pairs if pair[0] != "hydra"], "hydra": values[keys.index("hydra")]}
        return {"$pairs": pairs}

    def _of_hydra(self, node: Any, types: dict[str, str], above: Mapping[int, Any]) -> dict[str, Any]:
        """Freeze Hydra's own node: what no job changes, once."""
        found: dict[str, Any] = {}
        for key in node:
            if key in OF_JOBS:
                found[key] = self._child(node, key, f"hydra.{key}", types, above)
                continue
            if key not in self._hydra.known:
                own: dict[str, str] = {}
                self._hydra.known[key] = self._child(node, key, f"hydra.{key}", own, above), own
            found[key], own = self._hydra.known[key]
            types.update(own)
        return found

    def _child(self, parent: Any, key: Any, path: str, types: dict[str, str], above: Mapping[int, Any]) -> Any:
        from omegaconf import Container

        node = parent._get_node(key)
        raw = _raw(node)
        if isinstance(raw, str):
            if raw == MISSING:
                return MISSING
            if "${" in raw or "\\" in raw:
                value = self._resolved(parent, key, node, path)
                if value is _NO_VALUE:
                    return self._checked(raw, path)
                if isinstance(value, Container):
                    return self._container(value, path, types, above)
                return self._leaf(value, path, node)
        if isinstance(node, Container):
            return None if raw is None else self._container(node, path, types, above)
        if is_named_secret(path, self.clean(raw) if isinstance(raw, str) else raw):
            self._in_clear.append(node)
        return self._leaf(raw, path, node)

    def _resolved(self, parent: Any, key: Any, node: Any, path: str) -> Any:
        """Return what an interpolation stands for, :data:`_NO_VALUE` if it must stay one."""
        from omegaconf import Container

        if not node._is_interpolation():
            return _raw(node)
        if path in LAZY or path.startswith(OVERRIDES):
            return _NO_VALUE
        self._at = path
        try:
            value = parent[key]
        except Exception:  # whatever a resolver raises: the job may know more, and else has the same error as by hand
            return _NO_VALUE
        if isinstance(value, Container) or value is None:
            return value
        return value if isinstance(value, bool | int | float | str | bytes | Path | enum.Enum) else _NO_VALUE

    def _is_known_later(self, name: str) -> bool:
        """Return whether a job may see another value of the environment's variable ``name`` than who plans."""
        own = self._at.split(".")[0] == "hydra"  # which is acted on before
        return not own and (name.startswith("SLURM_") or name in self._set_by_hydra)

    def _leaf(self, value: Any, path: str, node: Any = None) -> Any:
        if value is None or isinstance(value, bool) or type(value) in (int, float):
            return value
        if isinstance(value, enum.Enum):
            kind = _name_of(type(value))
            if _is_typed(node) or kind is None:
                return value.name
            return {"$enum": [kind, value.name]}
        if isinstance(value, bytes):
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, Path):
            text = self._checked(_escaped(str(value)), path)
            return text if _is_typed(node) else {"$path": text}
        if isinstance(value, str):
            return self._checked(_escaped(str(value)), path)
        if isinstance(value, int | float):
            return float(value) if isinstance(value, float) else int(value)
        raise ConfigError(
            f"{path}: a value of type {type(value).__name__} cannot be frozen. Write it as text or a number."
        )

    def _checked(self, text: str, path: str) -> str:
        text = self.clean(text)
        if len(text) >= 12 and SECRET_VALUE.search(re.sub(r"\$\{[^}]*\}", "", text)):
            self._problems.append(
                f"{path}: its value looks like a secret, and a plan is a file. Set it in the environment, and write "
                f"{path}: ${{oc.env:NAME}}, which stays as it is until the job runs."
            )
        return text


def _variables(cfg: DictConfig) -> frozenset[str]:
    from omegaconf import DictConfig, OmegaConf

    found = OmegaConf.select(cfg, "hydra.job.env_set", throw_on_resolution_failure=False)
    return frozenset(map(str, found)) if isinstance(found, DictConfig) else frozenset()


@contextmanager
def _without_what_only_jobs_know() -> Iterator[None]:
    """Have ``${hydra:KEY}`` be an error where Hydra has no value yet; it would be None."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.basecontainer import BaseContainer

    def hydra(path: str, *more: Any) -> Any:
        cfg: Any = HydraConfig.instance().cfg
        return OmegaConf.select(cfg.hydra, path, throw_on_missing=True, throw_on_resolution_failure=True)

    before = BaseContainer._resolvers.get("hydra")
    register_resolver("hydra", hydra)
    try:
        yield
    finally:
        del BaseContainer._resolvers["hydra"]
        if before is not None:
            BaseContainer._resolvers["hydra"] = before


class _HydraNode:
    """What was frozen of the node ``hydra`` in the config ``of``, which is composed once, and then has each job's values.

    ``is_alike``: its interpolations lead to nothing that jobs change.
    """

    def __init__(self, of: DictConfig | None) -> None:
        self.of = of
        self.known: dict[str, tuple[Any, dict[str, str]]] = {}
        self.is_alike = False
        if of is not None and "hydra" in of:
            from omegaconf import OmegaConf

            texts = str(OmegaConf.to_container(of.hydra, resolve=False))
            own = len(re.findall(r"\$\{(?:hydra[.:](?!job\.override|overrides|launcher)|now:|python_version:)", texts))
            self.is_alike = own == texts.count("${")


def revealed(values: Any, secrets: Mapping[str, Any]) -> Any:
    """Return frozen values with the secrets that numbers stand for in them.

    Raises:
        KeyError: one is missing.
    """
    if isinstance(values, Mapping):
        return {key: revealed(value, secrets) for key, value in values.items()}
    if isinstance(values, list):
        return [revealed(value, secrets) for value in values]
    found = _NUMBER.fullmatch(values) if isinstance(values, str) else None
    if found is None:
        return values
    secret = secrets[found.group(1)]
    return _escaped(secret) if isinstance(secret, str) else secret


def thaw(values: Mapping[str, Any]) -> DictConfig:
    """Return the config that was frozen as ``values``, in struct mode as Hydra gives it to a program.

    Classes of structured nodes are looked up among modules that are loaded; nothing is imported.

    Raises:
        ConfigError: a class is not there, or a value does not fit it any more.
    """
    from omegaconf import OmegaConf

    content = dict(values)
    types = dict(content.pop(TYPES, []))
    cfg = _thaw(content, "", types)
    OmegaConf.set_struct(cfg, True)
    found: DictConfig = cfg
    return found


def _thaw(value: Any, path: str, types: Mapping[str, str]) -> Any:
    from omegaconf import ListConfig, OmegaConf, flag_override
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(value, list):
        made = ListConfig([])
        for number, member in enumerate(value):
            made.append(_thaw(member, f"{path}.{number}", types))
        return made
    if not isinstance(value, Mapping):
        return value
    if len(value) == 1:
        (name, content), *_ = value.items()
        if name in MARKS:
            return MARKS[name](content)
    pairs = value.get("$pairs", []) if len(value) == 1 or not path else []
    items = [(_thaw(k, path, {}), v) for k, v in pairs]
    items += [(k, v) for k, v in value.items() if k != "$pairs"]
    node = OmegaConf.structured(_class_of(types[path], path)) if path in types else OmegaConf.create({})
    with flag_override(node, ["struct", "readonly"], False):
        given = {key for key, _ in items}
        for key in [key for key in node if key not in given]:
            del node[key]
        for key, content in items:
            full = f"{path}.{key}" if path else str(key)
            try:
                if isinstance(content, str) and path in types:
                    OmegaConf.update(node, key, content, merge=False)  # text becomes what the class wants
                else:
                    node[key] = made = _thaw(content, full, types)
                    # that of a frozen class is lost on the way
                    if OmegaConf.is_config(made) and OmegaConf.is_readonly(made):
                        OmegaConf.set_readonly(cast("DictConfig", node._get_node(key)), True)
            except (OmegaConfBaseException, ValueError) as error:
                raise ConfigError(
                    f"{full}: {content!r} does not fit {types.get(path, 'its place')}: {str(error).splitlines()[0]}"
                ) from None
    return node


def _enum(content: Any) -> Any:
    kind, name = content
    return _class_of(kind, "")[name]


MARKS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "$path": Path,
    "$bytes": base64.b64decode,
    "$enum": _enum,
}


def _raw(node: Any) -> Any:
    """Return what a node holds; that of a ``Union`` holds another node."""
    from omegaconf import UnionNode

    held = node._value()
    return held._value() if isinstance(node, UnionNode) and hasattr(held, "_value") else held


def _is_typed(node: Any) -> bool:
    """Return whether the node makes what it was of text by itself."""
    from omegaconf import EnumNode
    from omegaconf.nodes import PathNode

    return isinstance(node, EnumNode | PathNode)


def _name_of(kind: type) -> str | None:
    """Return ``module:class``; None: it cannot be found by that, as a class that a function has made."""
    name = f"{kind.__module__}:{kind.__qualname__}"
    return name if _found(name) is kind else None


def _found(name: str) -> Any:
    module, _, attributes = name.partition(":")
    found: Any = sys.modules.get(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute, None)
    return found


def _class_of(name: str, path: str) -> Any:
    found = _found(name)
    if not isinstance(found, type):
        raise ConfigError(f"{path}: it was a {name} when the sweep was planned, and the program has no such class now.")
    return found


def _escaped(text: str) -> str:
    """Return ``text`` as OmegaConf reads it back: an interpolation that is meant literally has a backslash."""
    if "${" not in text:
        return text
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
