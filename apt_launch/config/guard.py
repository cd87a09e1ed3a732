"""What a config may not do: have Hydra build or open what it should not, or carry a secret into files.

A config comes from many people: presets, profiles of colleagues, folders given by ``--config-dir``. Hydra builds callbacks,
launchers, sweepers and log handlers from its own node before any code of ours sees a value, so that node is judged where
configs are composed. What Hydra builds from is resolved first and stays as it was judged: an interpolation has no second
value. What the groups may build is :data:`apt_launch.config.instantiate.ALLOWED`.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, ValueNode, flag_override
from omegaconf.errors import OmegaConfBaseException

from apt_launch.config.composing import version_base
from apt_launch.config.logging_guard import FORMATTERS, HANDLERS, logging_problems
from apt_launch.config.yaml_file import load_yaml, parsed
from apt_launch.interpolations import bounded
from apt_launch.secrets import (
    SecretError,
    secret_error,
    secret_leaves,
    secret_problems,
    without_secrets_of_the_environment,
)
from apt_launch.version import is_hydra_before_1_4
from apt_model.errors import ConfigError, nearest

CALLBACKS: Final = frozenset(
    {
        "apt_launch.runs.before_start.CheckBeforeStart",
        "apt_launch.config.CheckBeforeStart",  # as earlier versions call it
    }
)
"""What a callback may be. It takes no arguments."""

LAUNCHERS: Final = frozenset(
    {
        "hydra_plugins.apt_launch.PlanSweeper",
        "hydra_plugins.apt_launch.LocalLauncher",
        "hydra_plugins.apt_launch.SlurmLauncher",
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    }
)
"""What a launcher or a sweeper may be, beside plugins that are installed."""

PLUGINS: Final = "hydra_plugins."
"""The package of installed plugins, whose classes a launcher or a sweeper may be."""

OPTUNA: Final = re.compile(r"optuna\.samplers\.[A-Z]\w*Sampler|optuna\.pruners\.[A-Z]\w*Pruner")
"""What the sweeper of Optuna may be given."""

OF_OPTUNA: Final = ("optuna.samplers.*", "optuna.pruners.*")
"""The same as Hydra 1.4 takes it."""

BUILT: Final = ("callbacks", "hydra_logging", "job_logging", "launcher", "sweeper")
"""What Hydra builds objects from."""

PACKAGES: Final = frozenset({"hydra.conf"})
"""Packages whose configs ``hydra.searchpath`` may name: Hydra imports them."""

ENVIRONMENT: Final = frozenset(
    {
        *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "OMP_SCHEDULE", "OMP_DYNAMIC", "OMP_WAIT_POLICY"),
        *("MKL_NUM_THREADS", "MKL_DYNAMIC", "OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"),
        *("NUMEXPR_NUM_THREADS", "NUMEXPR_MAX_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME", "GOMP_CPU_AFFINITY"),
        *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS"),
        *("CUDA_MODULE_LOADING", "CUBLAS_WORKSPACE_CONFIG", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
        *("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY", "NCCL_IB_DISABLE"),
        *("NCCL_IB_HCA", "NCCL_IB_GID_INDEX", "NCCL_IB_TIMEOUT", "NCCL_IB_SL", "NCCL_IB_TC", "NCCL_P2P_DISABLE"),
        *("NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE", "NCCL_NET_GDR_LEVEL", "NCCL_CROSS_NIC", "NCCL_ALGO", "NCCL_PROTO"),
        *("NCCL_NTHREADS", "NCCL_BUFFSIZE", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "GLOO_SOCKET_IFNAME"),
        *("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"),
        *("TORCH_DISTRIBUTED_DEBUG", "TORCH_CPP_LOG_LEVEL", "TORCH_SHOW_CPP_STACKTRACES"),
        *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "NO_COLOR"),
        *("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"),
    }
)
"""Variables that ``hydra.job.env_set`` and ``env_copy`` may name: threads, devices and how processes talk to each other.

None of them makes a program load code, write a file, or talk to another server.
"""

PATHS: Final = ("run.dir", "sweep.dir", "sweep.subdir", "output_subdir", "job.name")
"""Keys below ``hydra`` that become names of folders and files."""

INSIDE: Final = ("sweep.subdir", "output_subdir", "job.name")
"""Those of :data:`PATHS` that stay in the run's folder."""


def main_arguments() -> dict[str, Any]:
    """Return the arguments of ``hydra.main`` beside where configs are: of 1.4 on, also what Hydra itself may build."""
    if is_hydra_before_1_4():
        return version_base()
    return {"execution_whitelist": sorted({*CALLBACKS, *HANDLERS, *FORMATTERS, *OF_OPTUNA})}


@contextmanager
def installed() -> Iterator[None]:
    """Judge every config that Hydra composes in this process meanwhile, and every file that it reads for it."""
    import hydra._internal.hydra as hydra
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    Plugins.instance()  # registers Hydra's own readers, which ours replace
    files = SourcesRegistry.instance().types
    loader, readers = hydra.ConfigLoaderImpl, dict(files)  # type: ignore[attr-defined]
    hydra.ConfigLoaderImpl = _guarded_loader()  # type: ignore[attr-defined, assignment]
    files |= {"file": _guarded_files(), "pkg": _kept_packages(), "structured": _shared_store()}
    try:
        with without_secrets_of_the_environment(), _choices_where_asked_for():
            yield
    finally:
        hydra.ConfigLoaderImpl = loader  # type: ignore[attr-defined]
        files |= readers


@contextmanager
def _choices_where_asked_for() -> Iterator[None]:
    """Have what was chosen put together for lists of defaults with an interpolation alone, as Hydra 1.4 does.

    Hydra 1.3 does it for every config of the list, in a quarter of the time that composing takes.
    """
    if not is_hydra_before_1_4():
        yield
        return
    import hydra._internal.defaults_list as module

    together = module._create_interpolation_map

    def choices(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        asked = any(default.is_interpolation() for default in defaults if not default.is_self())
        return together(overrides, defaults, self_added) if asked else None

    module._create_interpolation_map = choices  # type: ignore[assignment]
    try:
        yield
    finally:
        module._create_interpolation_map = together


@functools.cache
def _guarded_loader() -> type:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    class GuardedLoader(ConfigLoaderImpl):
        _kept: tuple[str | None, list[str], DictConfig] | None = None

        def _load_configuration_impl(  # all ways lead here
            self, config_name: str | None, overrides: list[str], run_mode: RunMode, *arguments: Any, **options: Any
        ) -> DictConfig:
            with bounded():
                if (composed := self._composed_before(config_name, overrides, run_mode, options)) is None:
                    composed = self._composed(config_name, overrides, run_mode, *arguments, **options)
                if not options.get("validate_sweep_overrides", True):  # Hydra 1.3 composes all to read hydra.mode alone
                    self._kept = config_name, list(overrides), composed
                    return composed
                for name in composed:  # whoever resolves them later meets no more than is met here
                    _resolve_all(composed, str(name))
                check_hydra(composed)
            return composed

        def _composed_before(
            self, config_name: str | None, overrides: list[str], run_mode: RunMode, options: dict[str, Any]
        ) -> DictConfig | None:
            """Return what was composed to read the mode, as Hydra would compose it again: with the mode for an override more."""
            kept, self._kept = self._kept, None
            if kept is None or config_name != kept[0] or overrides[: len(kept[1])] != kept[1]:
                return None
            composed, added = kept[2], overrides[len(kept[1]) :]
            if added != [f"hydra.mode={run_mode.name}"] or (
                run_mode == RunMode.RUN and "???" in OmegaConf.to_container(composed.hydra.runtime.choices).values()  # type: ignore[union-attr]
            ):  # a group without an option is left out where the mode is asked for, and refused in a run
                return None
            self.validate_sweep_overrides_legal(
                OverridesParser.create().parse_overrides(overrides), run_mode, options.get("from_shell", True)
            )
            composed.hydra.mode = run_mode
            composed.hydra.overrides.hydra.extend(added)
            return composed

        def _composed(self, *arguments: Any, **options: Any) -> DictConfig:
            try:
                return super()._load_configuration_impl(*arguments, **options)
            except ValueError as error:
                if str(error).startswith("Config group override must be"):  # and of which is not said
                    raise self._no_option(arguments[1]) from error
                raise
            except KeyError as error:
                if error.args and error.args[0] not in os.environ and isinstance(error.__context__, KeyError):
                    raise ConfigError(
                        f"hydra.job.env_copy: the variable {error.args[0]!r} is not set here. Export it in the shell, or leave "
                        "it out."
                    ) from None
                raise

        def _no_option(self, overrides: list[str]) -> ConfigError:
            problems = []
            for one in OverridesParser.create().parse_overrides(overrides):
                group, value = one.get_key_element().split("@")[0].lstrip("+"), one.value()
                if not isinstance(value, str | list) and self.repository.group_exists(group):
                    asked, options = str(one.input_line), self.repository.get_group_options(group)
                    problems.append(
                        f"{asked}: the group takes the name of an option. {nearest(asked.partition('=')[2], options)}"
                    )
            return ConfigError(*problems or ["a group takes the name of an option."])

        def _compose_config_from_defaults_list(self, defaults: list[Any], repo: Any) -> Any:
            merge = functools.partial(super()._compose_config_from_defaults_list, defaults=defaults, repo=repo)
            return _merged(_contents(defaults, repo), merge)

        def _process_config_searchpath(self, config_name: Any, parsed_overrides: Any, repo: Any) -> None:
            initialize = repo.initialize_sources

            def checked(search_path: Any) -> None:
                check_search_path(search_path)
                initialize(search_path)

            repo.initialize_sources = checked
            try:
                super()._process_config_searchpath(config_name, parsed_overrides, repo)
            finally:
                del repo.initialize_sources

    return GuardedLoader


@functools.cache
def _guarded_files() -> type:
    from hydra._internal.core_plugins.file_config_source import FileConfigSource

    class GuardedFiles(FileConfigSource):
        def load_config(self, config_path: str) -> Any:
            from pathlib import Path

            path = Path(self.path, self._normalize_file_name(config_path))
            return _result(self, *load_yaml(path))

        def list(self, config_path: str, results_filter: Any) -> list[str]:
            try:
                return super().list(config_path, results_filter)
            except OSError as error:
                raise ConfigError(f"{error.filename}: the folder cannot be read: {error.strerror}.") from None

    GuardedFiles.__name__ = FileConfigSource.__name__  # Hydra registers one class a scheme, by this name
    return GuardedFiles


@functools.cache
def _kept_packages() -> type:
    from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource

    class KeptPackages(ImportlibResourcesConfigSource):
        def _read_config(self, res: Any) -> Any:  # Hydra's own configs: five of them for each job of a plan
            text = res.read_text(encoding="utf-8")
            return _result(self, text, parsed(text))

    KeptPackages.__name__ = ImportlibResourcesConfigSource.__name__  # see above
    return KeptPackages


@functools.cache
def _shared_store() -> type:
    from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource

    class SharedStore(StructuredConfigSource):
        def __deepcopy__(self, memo: Any) -> Any:
            return self  # Hydra copies its sources for each config, and with this one all of ConfigStore

    SharedStore.__name__ = StructuredConfigSource.__name__  # see above
    return SharedStore


def _result(source: Any, text: str, content: Any) -> Any:
    from hydra.plugins.config_source import ConfigResult

    result = ConfigResult(
        config=content,
        path=f"{source.scheme()}://{source.path}",
        provider=source.provider,
        header=source._get_header_dict(text[:512]),
    )
    result.text = text  # type: ignore[attr-defined]
    return result


def _contents(defaults: list[Any], repo: Any) -> bytes | None:
    """Return what Hydra merges for a list of defaults, as a key; None: that cannot be told."""
    schemas, found = repo.get_schema_source(), []
    for default in defaults:
        one = repo.load_config(config_path=default.config_path)
        if one is None or (not one.is_schema_source and schemas.is_config(default.config_path)):
            return None  # a schema of the same name is merged, too
        content = getattr(one, "text", None) or (one.header, one.config)
        found.append((default.config_path, default.package, default.primary, content))
    try:
        return pickle.dumps(found)
    except (pickle.PicklingError, AttributeError, TypeError):  # a class that is in no module
        return None


MOST_KEPT: Final = 64
"""Merged configs that are kept, 50 kB each with the texts that they are of."""

_kept_merges: dict[bytes, bytes] = {}


def _merged(contents: bytes | None, merge: Callable[[], DictConfig]) -> DictConfig:
    """Return what ``merge`` does, of the same contents only once: jobs of a plan differ in values, which come later.

    To unpickle takes 2 ms, and Hydra 50 to merge twenty configs.
    """
    if contents is None:
        return merge()
    if contents in _kept_merges:
        return pickle.loads(_kept_merges[contents])  # type: ignore[no-any-return]
    merged = merge()
    if len(_kept_merges) == MOST_KEPT:
        del _kept_merges[next(iter(_kept_merges))]
    _kept_merges[contents] = pickle.dumps(merged)
    return merged


def check_search_path(search_path: Any) -> None:
    """Judge where ``hydra.searchpath`` leads, before Hydra imports a package for it.

    Raises:
        ConfigError: with every problem found.
    """
    problems = []
    for entry in search_path.get_path():
        scheme, separator, rest = str(entry.path).partition("://")
        if not str(entry.provider).startswith("hydra.searchpath") or not separator or scheme == "file":
            continue
        if scheme != "pkg" or rest.replace("/", ".").strip(".") not in PACKAGES:
            problems.append(
                f"hydra.searchpath: {entry.path!r} would import a package of the config's choice. Name a folder: file://DIR."
            )
    if problems:
        raise ConfigError(*problems)


def check_hydra(composed: DictConfig) -> None:
    """Judge the node ``hydra`` of a composed config as Hydra will act on it; what is built is resolved from now on.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[str] = []
    if _is_reference(composed, "hydra"):
        raise ConfigError("hydra: the node may not be an interpolation.")
    hydra = composed["hydra"]
    for name in hydra:
        if _is_reference(hydra, str(name)) and str(name) not in BUILT and OmegaConf.is_config(_try(hydra, str(name))):
            problems.append(f"hydra.{name}: the node may not be an interpolation. Write its values out.")
    if problems:
        raise ConfigError(*problems)
    problems += secret_problems(OmegaConf.to_container(hydra, resolve=False), "hydra")
    for above, name in [
        *((hydra, name) for name in BUILT),
        (hydra.job, "env_set"),
        (hydra, "output_subdir"),
        (hydra.job, "name"),
    ]:
        problems += _pin(above, name)
    if problems:  # what does not resolve cannot be judged
        raise ConfigError(*dict.fromkeys(problems))
    plain: Any = OmegaConf.to_container(hydra, resolve=False)
    for name in BUILT:
        node = plain[name]
        if name in ("hydra_logging", "job_logging"):
            problems += logging_problems(node, f"hydra.{name}") if node is not None else []
        else:
            problems += _target_problems(node, name)
    problems += _environment_problems(hydra.job.env_set, "hydra.job.env_set")
    problems += _late_problems(composed)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def _is_reference(node: Any, key: str) -> bool:
    child = node._get_node(key)
    return child is not None and bool(child._is_interpolation())


def _try(node: Any, key: str) -> Any:
    try:
        return node[key]
    except (OmegaConfBaseException, RecursionError):
        return None


def _pin(above: DictConfig, key: str) -> list[str]:
    """Put values for interpolations below ``above.key``, so that what is judged is what is built; return what is wrong.

    The names of log files stay as they are: they have a folder only once the run has one.
    """
    path = _full_key(above, key)
    try:
        if not _refers(above, key):
            return []
        values = _resolved(above, key)
        with flag_override(above, ["struct", "readonly"], [False, False]):
            above[key] = _escaped(values)
        if _resolved(above, key) != values:
            return [f"{path}: an interpolation has more than one value. Write the value out."]
    except (OmegaConfBaseException, RecursionError) as error:
        return [f"{path}: {_reason(error)}"]
    return []


def _reason(error: Exception) -> str:
    if (secret := secret_error(error)) is not None:
        return str(secret)
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"an interpolation has no value before the run begins: {reason}. Write the value out."


def _full_key(above: DictConfig, key: str) -> str:
    return str(above._get_full_key(key))


def _refers(above: Any, key: Any) -> bool:
    """Return whether something below, other than the name of a log file, is an interpolation."""
    node = above._get_node(key)
    if node is None:
        return False
    if node._is_interpolation():
        return bool(key != "filename")
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        return any(_refers(node, name) for name in node)
    if isinstance(node, ListConfig) and not node._is_none() and not node._is_missing():
        return any(_refers(node, number) for number in range(len(node)))
    return False


def _resolved(above: Any, key: Any) -> Any:
    """Return the plain values below ``above.key``; the name of a log file as :class:`_AsWritten`."""
    node = above._get_node(key)
    if node._is_interpolation():
        if key == "filename":
            return _AsWritten(node._value())
        node = above[key]
    elif not OmegaConf.is_config(node):
        return node._value()
    if isinstance(node, DictConfig):
        if node._is_none() or node._is_missing():
            return node._value()
        return {name: _resolved(node, name) for name in node}
    if isinstance(node, ListConfig):
        if node._is_none() or node._is_missing():
            return node._value()
        return [_resolved(node, number) for number in range(len(node))]
    return node


class _AsWritten(str):
    """Text that keeps its interpolations."""


def _escaped(value: Any) -> Any:
    """Return ``value`` so that OmegaConf takes text for text, and no interpolation in it."""
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str) and not isinstance(value, _AsWritten):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return str(value) if isinstance(value, _AsWritten) else value


def _target_problems(node: Any, role: str) -> Iterator[str]:
    for path, target in _targets(node):
        if role == "callbacks":
            if not isinstance(target, str) or target not in CALLBACKS:
                yield f"hydra.callbacks.{path}: {target!r} may not be built here."
        elif not isinstance(target, str) or not (
            target in LAUNCHERS
            or (role == "sweeper" and OPTUNA.fullmatch(target))
            or (target.startswith(PLUGINS) and _is_class(target))
        ):
            yield f"hydra.{role}.{path}: {target!r} may not be built here."
    if role == "callbacks" and isinstance(node, Mapping):
        for name, callback in node.items():
            if not isinstance(callback, Mapping):
                yield f"hydra.callbacks.{name}: {callback!r} is no callback. Leave it out."
                continue
            for key in callback:
                if key not in ("_target_", "_convert_", "_recursive_"):
                    yield f"hydra.callbacks.{name}.{key}: a callback takes no arguments here. Leave it out."
    if isinstance(node, Mapping):
        for key in ("_args_", "_partial_"):
            if key in node:
                yield f"hydra.{role}.{key}: a config may not set it. Leave it out."
        if node.get("custom_search_space") is not None:  # of Optuna: a function by its name
            yield f"hydra.{role}.custom_search_space: a config may not name a function. Write the space out in params."


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            below = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                yield below, value
            else:
                yield from _targets(value, below)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _targets(value, f"{path}.{number}")


def _is_class(target: str) -> bool:
    """Return whether ``target`` is a class of a plugin itself, and not an alias of something else."""
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception:
        return False
    return isinstance(found, type) and f"{found.__module__}.".startswith(PLUGINS)


def _environment_problems(node: Any, path: str) -> Iterator[str]:
    for key in node or {}:
        if key not in ENVIRONMENT:
            yield f"{path}.{key}: a config may not set it. Export it in the shell that starts the command: export {key}=..."
        elif (value := node[key]) is None or not re.fullmatch(r"[\x20-\x7e]{0,1000}", str(value)):
            yield f"{path}.{key}: {value!r} is not one line of plain text. Export it in the shell that starts the command."


def _late_problems(composed: DictConfig) -> Iterator[str]:
    """Yield what is wrong with values that Hydra resolves once a run has a number and a folder, with samples of those."""
    with _as_in_a_run(composed) as hydra:
        found = list(_leaves(hydra, "hydra"))
        yield from (f"{path}: {value}" for path, value in found if isinstance(value, SecretError))
        yield from secret_leaves((path, value) for path, value in found if not isinstance(value, SecretError))
        for key in PATHS:
            try:
                value = OmegaConf.select(hydra, key)
            except (OmegaConfBaseException, RecursionError) as error:
                yield f"hydra.{key}: {_reason(error)}"
                continue
            text = "" if value is None else str(value)
            if re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", text):
                yield f"hydra.{key}: {text!r} has a line break or a control character. Give a plain name."
            if key in INSIDE and (text.startswith(("/", "~")) or ".." in text.split("/")):
                yield f"hydra.{key}: {text!r} would lead out of the run's folder. Give a plain name."


@contextmanager
def _as_in_a_run(composed: DictConfig) -> Iterator[Any]:
    """Give the node ``hydra`` as a job has it, with what only a job knows filled in meanwhile."""
    from hydra.core.hydra_config import HydraConfig

    hydra, instance = composed.hydra, HydraConfig.instance()
    before = instance.cfg
    unknown = [
        (above, key, sample)
        for above, key, sample in ((hydra.job, "num", 0), (hydra.job, "id", "0"), (hydra.runtime, "output_dir", "/run"))
        if OmegaConf.is_missing(above, key)
    ]
    _set(unknown)
    try:
        instance.cfg = composed  # type: ignore[assignment]  # set_config would copy the node first
        yield hydra
    finally:
        instance.cfg = before
        _set((above, key, MISSING) for above, key, _ in unknown)


def _set(values: Iterable[tuple[DictConfig, str, Any]]) -> None:
    for above, key, value in values:
        with flag_override(above, ["struct", "readonly"], [False, False]):
            above[key] = value


def _resolve_all(above: DictConfig, name: str) -> None:
    """Resolve all below ``above.name``, but for what Hydra acts on, which was; what does not resolve is left to who needs it."""
    if name != "hydra":
        node = _try(above, name)
        for _ in _leaves(node, name) if isinstance(node, DictConfig | ListConfig) else ():
            pass


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield full keys and resolved values; what does not resolve is left to who needs it."""
    keys: Any = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        try:
            own = node._get_node(key)
            plain = isinstance(own, ValueNode) and not own._is_interpolation() and not own._is_missing()
            value = own._value() if plain else node[key]  # six times as fast as to ask for it
        except (OmegaConfBaseException, RecursionError) as error:
            if (secret := secret_error(error)) is not None:
                yield f"{path}.{key}", secret
            continue
        if isinstance(value, DictConfig | ListConfig):
            yield from _leaves(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", value
