"""Interpolations of a config that somebody else may have written: what they stand for is counted while they are resolved."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from apt_model.errors import ConfigError

MOST_RESOLVED: Final = 5000
"""Interpolations that one config may have, each counted wherever another stands for it."""

DEEPEST: Final = 16
"""Interpolations one within the other. Python's own limit on calls comes at about twice as many."""

MOST_VALUES: Final = 100_000
"""Values that interpolations may stand for; each 64 characters of text count as one."""

LONGEST: Final = 2000
"""Characters of one value with interpolations: OmegaConf takes some 30 microseconds for each."""

MOST_READ: Final = 100_000
"""Characters of all different values with interpolations."""

REMEDY: Final = "Write the value out."


@contextmanager
def bounded() -> Iterator[None]:
    """Refuse a config, meanwhile, whose interpolations stand for more than any config has, or for each other too deeply.

    They are counted where OmegaConf resolves them, whoever asks for it and however they are written: ``${a}${a}`` doubles at
    each level, and only who resolves it sees how far that goes. Equal values are parsed once.

    Raises:
        ConfigError: with the key that was asked for.
    """
    from omegaconf import base, grammar_parser
    from omegaconf.resolvers import oc

    container: Any = base.Container
    parsers: list[Any] = [base, oc]
    resolve, parse = container.resolve_parse_tree, grammar_parser.parse
    ways = {name: getattr(container, name) for name in ("_resolve_node_interpolation", "_evaluate_custom_resolver")}
    count = _Count(_kept_trees(parse))

    def resolved(self: Any, parse_tree: Any, node: Any, memo: Any = None, key: Any = None, **more: Any) -> Any:
        with count.value_of(self, key):
            found = resolve(self, parse_tree, node, memo=memo, key=key, **more)  # more: of OmegaConf 2.4
            count.add(found)
            return found

    def counted(way: Any) -> Any:
        def one(self: Any, *arguments: Any, **more: Any) -> Any:
            count.one()
            return way(self, *arguments, **more)

        return one

    container.resolve_parse_tree = resolved
    for name, way in ways.items():
        setattr(container, name, counted(way))
    for module in parsers:
        module.parse = count.parsed
    try:
        yield
    except Exception as error:
        if count.problem is None and (isinstance(error, RecursionError) or "RecursionError raised" in str(error)):
            count.problem = f"its interpolations are nested too deeply. {REMEDY}"
        if count.problem is not None:
            raise ConfigError(f"{count.asked}: {count.problem}") from None
        raise
    finally:
        container.resolve_parse_tree = resolve
        for name, way in ways.items():
            setattr(container, name, way)
        for module in parsers:
            module.parse = parse
    if count.problem is not None:  # whoever asked did without the value
        raise ConfigError(f"{count.asked}: {count.problem}")


@functools.cache
def _kept_trees(parse: Any) -> Any:
    """Return ``parse``, which keeps what it returned: jobs of a plan have the same interpolations."""
    return functools.lru_cache(maxsize=64)(parse)


class _Count:
    """What has been resolved so far."""

    def __init__(self, parse: Any) -> None:
        self._parse = parse
        self._trees: dict[tuple[Any, ...], Any] = {}
        self._read = self._resolved = self._values = self._depth = 0
        self._unread: str | None = None  # why the value that comes next was not parsed
        self.asked = "config"
        """The key whose value was asked for; others are resolved for it."""
        self.problem: str | None = None

    def parsed(self, value: str, *rule: Any, **more: Any) -> Any:
        """Return the parse tree of ``value``; one that is too long is refused where its key is known, and not parsed."""
        kind = (value, *rule, *more.values())
        if kind not in self._trees:
            if len(value) > LONGEST:
                self._unread = f"its interpolations are in a text of more than {LONGEST} characters. {REMEDY}"
            elif self._read + len(value) > MOST_READ:
                self._unread = f"values with interpolations have more than {MOST_READ} characters together. {REMEDY}"
            if self._unread is not None:
                return self._parse("x")
            self._read += len(value)
            self._trees[kind] = self._parse(value, *rule, **more)
        return self._trees[kind]

    @contextmanager
    def value_of(self, above: Any, key: Any) -> Iterator[None]:
        """Be at the value of ``key`` below ``above``, with its interpolations, meanwhile."""
        self._refuse_more()
        if self._depth == 0:
            self.asked = str(above._get_full_key(key))
        self.problem = self._unread
        if self._depth == DEEPEST:
            self.problem = f"more than {DEEPEST} interpolations stand for each other. {REMEDY}"
        self._refuse_more()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def one(self) -> None:
        """Count an interpolation."""
        self._resolved += 1
        if self._resolved > MOST_RESOLVED:
            self.problem = f"more than {MOST_RESOLVED} interpolations are resolved for this config. {REMEDY}"
        self._refuse_more()

    def add(self, found: Any) -> None:
        """Count what an interpolation stands for."""
        self._values += _size(found)
        if self._values > MOST_VALUES:
            self.problem = f"its interpolations stand for more than {MOST_VALUES} values. {REMEDY}"
        self._refuse_more()

    def _refuse_more(self) -> None:
        """Resolve nothing more, once there is a problem."""
        from omegaconf.errors import InterpolationResolutionError

        if self.problem is not None:
            raise InterpolationResolutionError(f"{self.problem}")


def _size(found: Any) -> int:
    """Return how much is in ``found``, without what its own interpolations stand for."""
    from omegaconf.base import Node

    content = found._value() if isinstance(found, Node) else found
    if isinstance(content, dict):
        return 1 + sum(map(_size, content.values()))
    if isinstance(content, list | tuple):
        return 1 + sum(map(_size, content))
    return 1 + (len(content) // 64 if isinstance(content, str) else 0)
