"""Composes the many configs of a sweep, which differ in a few overrides, as Hydra would and in milliseconds each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from apt_launch.interpolations import bounded
from apt_launch.secrets import is_named_secret, leaves
from apt_launch.secrets import without_values_of_the_environment as clean
from apt_launch.sweep.application import JobSpec, Program, Resources, load
from apt_launch.version import is_hydra_before_1_4
from apt_model.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


class Composer:
    """Composes and checks many configs that differ in a few overrides.

    Hydra composes each choice of groups once; values are then applied by Hydra's own function, in the command line's
    order, so that a job costs milliseconds.

    Args:
        loader: Hydra's, which knows where configs are.
        config_name: of the primary config.
        application: whose configs they are; see :func:`apt_launch.sweep.application.load`.
        program: what stands behind an application that is any.
        master: the config of the command that sweeps, whose overrides of Hydra's node every job has, and what it has resolved.
    """

    def __init__(
        self,
        loader: Any,
        config_name: str | None,
        application: str,
        program: Program | None = None,
        master: DictConfig | None = None,
    ) -> None:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        self.application = application
        self.program = program
        self._application = load(application, program)
        self._master = master
        of_hydra = overrides_of(master, "hydra") if master is not None else []
        self._of_hydra = of_hydra if program is not None else [o for o in of_hydra if o.startswith(f"{SEARCHPATH}=")]
        self._loader = loader
        self._config_name = config_name
        parser = OverridesParser.create(config_loader=loader)
        self._parse_all = parser.parse_overrides
        self._parse = cache(parser.parse_override)
        self._searchpath = _searchpath_among(map(self._parse, self._of_hydra))
        self._groups = cache(self._groups_with)
        self._is_group = cache(lambda name, searchpath: bool(self._groups(searchpath).group_exists(name)))
        self.identities: dict[tuple[str, ...], str] = {}
        """Of the jobs, by their overrides; a resolver may give another value when a job is composed again."""
        self._folders: dict[str, tuple[str, Resources, tuple[str, ...]]] = {}  # of outputs, and whose they are
        self._composed: dict[tuple[tuple[str, ...], tuple[str, ...]], DictConfig] = {}

    def search_as(self, command: Sequence[Override]) -> None:
        """Compose jobs where the overrides of a command, of which no config was composed yet, say that options are."""
        self._searchpath = _searchpath_among(command)
        self._of_hydra = [] if self._searchpath is None else [self._searchpath]

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Parse ``overrides``; ``glob`` knows the options of groups.

        Raises:
            HydraException: one is not of Hydra's grammar.
        """
        return self._parse_all(list(overrides))

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Compose one config as Hydra would, with the node ``hydra``.

        Raises:
            HydraException: an override has no place in the config.
        """
        from hydra.types import RunMode

        composed: DictConfig = self._loader.load_configuration(self._config_name, list(overrides), run_mode=RunMode.RUN)
        return composed

    def __call__(self, overrides: Sequence[str]) -> JobSpec:
        """Compose and check one config.

        Raises:
            ConfigError: with every problem found.
        """
        with bounded():
            spec = self._application.check(self._with_values(overrides))
        if self.program is not None:
            self._refuse_taken(spec, overrides)
        self.identities[tuple(overrides)] = spec.identity
        return spec

    def _refuse_taken(self, spec: JobSpec, overrides: Sequence[str]) -> None:
        """Refuse a job whose output folder another one has; where the job's number is in its name, each has its own."""
        place = spec.values.get("hydra", {}).get("sweep", {})
        folder = f"{place.get('dir')}/{place.get('subdir')}"
        if not place or "${" in folder:  # only the job knows
            return
        who = self._folders.setdefault(os.path.normpath(folder), (spec.identity, spec.resources, tuple(overrides)))
        if who[:2] != (spec.identity, spec.resources):
            raise ConfigError(TAKEN.format(folder=folder, other=" ".join(map(self.shown, who[2]))))

    def _with_values(self, overrides: Sequence[str]) -> DictConfig:
        """Compose one config, whose values are those of ``overrides`` until the next is composed."""
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from hydra.errors import HydraException
        from omegaconf import OmegaConf

        try:
            parsed = [self._parse(override) for override in (*self._of_hydra, *overrides)]
            searchpath = _searchpath_among(parsed)
            values = [o for o in parsed if not self._is_structural(o, searchpath)]
            if self.program is not None and (typed := list(filter(None, map(typed_secret, values)))):
                raise ConfigError(*(TYPED.format(key=key) for key in typed))
            structural = tuple(str(o.input_line) for o in parsed if self._is_structural(o, searchpath))
            known = (structural, tuple(o.key_or_group for o in values))
            if known not in self._composed:
                self._composed[known] = self.compose(structural)
            cfg = self._composed[known]
            if not all(_replaces_a_leaf(cfg, o) for o in values):
                cfg = cfg.copy()  # what is added, merged or removed must not stay for the next job
            ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
            if self.program is not None:
                _name_overrides(cfg, self._of_hydra, overrides, self._parse)
                if self._master is not None:  # ${now:}, as Hydra's launchers do; what the job before has resolved goes
                    OmegaConf.copy_cache(from_config=self._master, to_config=cfg)
        except HydraException as error:
            raise self._application.explain(error) from None
        return cfg

    def shown(self, override: str) -> str:
        """Return an override as files and messages may show it: without secrets."""
        if self.program is None:
            return override
        parsed = self._parse(override)
        hidden = not self._is_structural(parsed, self._searchpath) and typed_secret(parsed) is not None
        return f"{override.partition('=')[0]}=***" if hidden else clean(override)

    def _is_structural(self, override: Override, searchpath: str | None) -> bool:
        """Return whether ``override`` chooses a group's option, or says where options are; the rules are Hydra's."""
        if override.package is not None or override.get_key_element() == SEARCHPATH:
            return True
        return self._is_group(override.key_or_group, searchpath) and not isinstance(override.value(), dict)

    def _groups_with(self, searchpath: str | None) -> Any:
        """Return what Hydra asks for groups and options: ``loader.repository`` lacks what ``hydra.searchpath`` adds.

        Args:
            searchpath: an override of it; None: what the primary config says counts.
        """
        given = [] if searchpath is None else [searchpath]
        return self._loader._parse_overrides_and_create_caching_repo(self._config_name, given)[1]


SEARCHPATH: Final = "hydra.searchpath"

TYPED: Final = (
    "{key}: by its name it holds a secret, and files of a sweep have its command line. Set it in the environment, and write "
    "{key}='${{oc.env:NAME}}', which stays as it is until the job runs."
)

TAKEN: Final = (
    "hydra.sweep.subdir: the output folder {folder} would be also that of the job with {other}, and one would overwrite the "
    "other's files. Put what differs into the name, or ${{hydra:job.num}}."
)


def _searchpath_among(overrides: Iterable[Override]) -> str | None:
    """Return the override of ``hydra.searchpath`` that Hydra obeys, as it was written: the first one."""
    return next((str(o.input_line) for o in overrides if o.get_key_element() == SEARCHPATH), None)


def typed_secret(override: Override) -> str | None:
    """Return the key under which an override has a secret in clear; None: it has none."""
    parsed: Any = None if override.is_delete() else override.value()
    values = getattr(parsed, "list", None) or [
        getattr(parsed, "start", parsed)
    ]  # of choices, of a range or an interval
    for value in values:
        for key, leaf in leaves(getattr(value, "text", value), override.key_or_group):
            if is_named_secret(key, clean(leaf) if isinstance(leaf, str) else leaf):
                return key
    return None


def overrides_of(config: DictConfig, kind: str) -> list[str]:
    """Return the overrides of a command, of its ``task`` or of ``hydra``, as they were written."""
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(config.hydra.overrides[kind], resolve=False)
    return [str(override) for override in found]


def _name_overrides(cfg: DictConfig, of_hydra: Sequence[str], of_task: Sequence[str], parse: Any) -> None:
    """Write down a job's overrides where Hydra has them."""
    from omegaconf import open_dict

    node = cfg.hydra
    with open_dict(node):
        node.overrides.hydra = list(of_hydra)
        node.overrides.task = list(of_task)
        if (
            is_hydra_before_1_4()
        ):  # an interpolation later; of the text, which may have those of overrides, that cannot be told
            rule = node.job.config.override_dirname
            lines = sorted(line for line in of_task if parse(line).key_or_group not in rule.exclude_keys)
            node.job.override_dirname = rule.item_sep.join(lines).replace("=", rule.kv_sep)
        for key in node.job.env_copy:
            node.job.env_set[key] = os.environ[key]


def _replaces_a_leaf(cfg: DictConfig, override: Override) -> bool:
    """Return whether ``override`` sets a value where a value stands: the next job sets the same key again."""
    from omegaconf import DictConfig, OmegaConf

    if override.is_add() or override.is_force_add() or override.is_delete():
        return False
    if isinstance(override.value(), dict | list):
        return False
    above, _, last = override.key_or_group.rpartition(".")
    parent = OmegaConf.select(cfg, above) if above else cfg
    return isinstance(parent, DictConfig) and last in parent and not OmegaConf.is_config(parent._get_node(last))
