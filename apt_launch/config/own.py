"""Classes and functions of packages that the user allows: found, and their parameters checked, before one is called.

A config is trusted no more than before: it may name what a package defines itself, and nothing that the package has from
elsewhere, under whatever name.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from types import FunctionType, ModuleType
from typing import Any, Final, get_type_hints

from apt_launch.allow import FLAG, NAME, OTHERS, allowed, covers
from apt_model.errors import ConfigError, cause_of, nearest

OPTIMIZERS: Final = "torch.optim."
"""The package whose optimizers any config may name."""

UNFIT: Final = {
    "LBFGS": "it evaluates a batch several times in one update",
    "SparseAdam": "it takes sparse gradients, which no layer here has",
}
"""Optimizers of torch's that no loop here can use, and why."""

Target = Callable[..., Any]


def find(target: str, key: str) -> Target:
    """Return the class or function ``target`` of a package that is allowed here, or one of torch's optimizers.

    Raises:
        ConfigError: it is not allowed, not there, or defined elsewhere; ``key`` is where the config names it.
    """
    try:
        if is_optimizer_name(target):
            return _optimizer(target)
        return _own(target)
    except ConfigError as error:
        raise ConfigError(*[f"{key}: {problem}" for problem in error.problems]) from error.__cause__


def refusal(target: object) -> str:
    """Say that ``target`` may not be built here, and with which flag it may."""
    text = f"{target!r} may not be built here."
    if isinstance(target, str) and NAME.fullmatch(target) and "." in target and importable(target):
        return f"{text} If you trust it and it is yours, say so: {FLAG} {target.partition('.')[0]}."
    return text


def importable(target: str) -> bool:
    """Return whether a flag could allow ``target``; nothing is imported for it."""
    return target.partition(".")[0] not in OTHERS | {"torch"}


def is_optimizer_name(target: str) -> bool:
    """Return whether ``target`` has the form of the name of an optimizer of torch's."""
    return target.startswith(OPTIMIZERS) and target.removeprefix(OPTIMIZERS).isidentifier()


def is_named(target: object) -> bool:
    """Return whether ``target`` lies in a package that is allowed here."""
    return (
        isinstance(target, str)
        and bool(NAME.fullmatch(target))
        and any(covers(package, target.rpartition(".")[0]) for package in allowed())
    )


def _optimizer(target: str) -> Target:
    import torch

    name = target.removeprefix(OPTIMIZERS)
    if name in UNFIT:
        raise ConfigError(f"{name} cannot train here: {UNFIT[name]}. Choose another optimizer.")
    found = vars(torch.optim).get(name)
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer:
        home = vars(found).get("__module__", "")
        if found.__name__ == name and f"{home}.".startswith(OPTIMIZERS):
            return found
    known = [
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name not in ("Optimizer", *UNFIT)
    ]
    raise ConfigError(f"torch {torch.__version__} has no optimizer {name!r}. {nearest(name, known)}")


def _own(target: str) -> Target:
    if not is_named(target):
        raise ConfigError(refusal(target))
    path, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(path)
    except Exception as error:
        first = path.partition(".")[0]
        hint = f"Start the command in the folder that holds {first}, install it, or name that folder in PYTHONPATH"
        raise ConfigError(f"{path} cannot be imported ({cause_of(error)}). {hint}.") from error
    if name not in vars(module):
        names = [other for other in vars(module) if _defined(module, other)]
        raise ConfigError(f"{path} has no {name!r}. {nearest(name, names)}")
    found = vars(module)[name]
    home = _home(found)
    if home is None or not any(covers(package, home.__name__) for package in allowed()):
        raise ConfigError(
            f"{target} is not what {path.partition('.')[0]} defines, but {_described(found)}. A config may name classes and "
            "functions that the package defines itself, by class or def at the top of a module."
        )
    made: Target = found
    return made


def _home(found: object) -> ModuleType | None:
    """Return the module whose text defines ``found``, a class or a plain function; None: there is none.

    Names that objects have of themselves can be set by anybody; so the text of the module is asked, which dictionary a
    function looks its names up in, and which functions a class was made with.
    """
    if type(found) is FunctionType:
        space = found.__globals__
        home = next((module for module in [*sys.modules.values()] if getattr(module, "__dict__", None) is space), None)
        name = found.__name__
    elif issubclass(type(found), type):
        own = type.__dict__["__dict__"].__get__(found)  # not what a metaclass says
        home = sys.modules.get(str(own.get("__module__", "")))
        name = type.__dict__["__name__"].__get__(found)
        made_here = [value for value in own.values() if type(value) is FunctionType]
        if home is None or (made_here and not any(value.__globals__ is vars(home) for value in made_here)):
            return None
    else:
        return None
    if home is None or vars(home).get(name) is not found or not _defined(home, name):
        return None
    return home


def _defined(module: ModuleType, name: str) -> bool:
    """Return whether a ``class`` or ``def`` at the top of the module's text has that name."""
    return name in _definitions(module)


@cache
def _definitions(module: ModuleType) -> frozenset[str]:
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    found: set[str] = set()
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            waiting += [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)]
            waiting += [part for one in getattr(node, "handlers", []) for part in one.body]
    return frozenset(found)


def _described(found: object) -> str:
    if issubclass(type(found), type):
        own = type.__dict__["__dict__"].__get__(found)
        return f"the class {own.get('__module__')}.{type.__dict__['__name__'].__get__(found)}"
    if type(found) is FunctionType:
        return f"a function of {found.__globals__.get('__name__')}"
    return f"something of the type {type(found).__name__}"


# --- parameters ---------------------------------------------------------------------------------------------------------


def parameters(target: Target) -> Mapping[str, inspect.Parameter]:
    """Return the parameters that ``target`` takes by name."""
    try:
        found = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return {name: parameter for name, parameter in found.items() if parameter.kind not in positional}


def takes(target: Target, name: str) -> bool:
    """Return whether ``target`` can be called with ``name``."""
    known = parameters(target)
    return name in known or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())


def problems_of(target: Target, values: Mapping[str, Any], key: str, injected: tuple[str, ...] = ()) -> list[str]:
    """Say which of ``values`` are no parameters of ``target``, are missing, or are not of the type that it writes down.

    Args:
        key: where ``values`` stand in the config.
        injected: parameters that the launcher gives, and no config.
    """
    known = {
        name: one
        for name, one in parameters(target).items()
        if name not in injected and one.kind is not inspect.Parameter.VAR_KEYWORD
    }
    others = takes(target, "")
    name_of = getattr(target, "__name__", str(target))
    try:
        hints = get_type_hints(getattr(target, "__init__") if isinstance(target, type) else target)  # noqa: B009
    except Exception:  # what is imported for the type checker alone, say
        hints = {}
    problems = [
        f"{key}.{path}: {refusal(nested)}"
        for path, nested in _targets_within(values)
        if not (isinstance(nested, str) and (is_named(nested) or is_optimizer_name(nested)))
    ]
    for name, value in values.items():
        if name.startswith("_"):
            problems.append(f"{key}.{name}: a config may not set it here. Leave it out.")
        elif name in injected:
            problems.append(f"{key}.{name}: {name_of} is given it by the launcher. Leave it out.")
        elif name not in known:
            if not others:
                problems.append(
                    f"{key}.{name}: unknown key: {name_of} takes no such parameter. {nearest(name, known)} To leave it out: "
                    f"~{key}.{name}"
                )
        elif name in hints and (reason := _misfit(hints[name], value)):
            problems.append(f"{key}.{name}: {value!r} is not valid: {reason}.")
    empty = inspect.Parameter.empty
    problems += [
        f"{key}.{name}: missing, and {name_of} has no default for it. Give it a value: +{key}.{name}=..."
        for name, one in known.items()
        if one.default is empty and name not in values
    ]
    return problems


def _targets_within(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is named by ``_target_`` below ``value``, with its path."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    for name, part in parts:
        below = f"{path}.{name}" if path else str(name)
        if name == "_target_":
            yield below, part
        else:
            yield from _targets_within(part, below)


def _misfit(hint: Any, value: Any) -> str | None:
    """Say why ``value`` does not have the type ``hint``; None: it has, or nobody can tell."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if isinstance(value, Mapping) and "_target_" in value:
        return None  # what it will be is known once it is built
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:  # no type that data can have
        try:
            adapter = TypeAdapter(hint)
        except Exception:
            return None
    try:
        adapter.validate_json(json.dumps(value), strict=True)  # as JSON: a list is a tuple, too
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        return message[0].lower() + message[1:]
    except (TypeError, ValueError):
        return None
    return None
