"""Commands as messages print them: quoted for the shell and, where they hold overrides, for Hydra."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

WHERE_CONFIGS_ARE = ("--config-dir", "--config-name", "--config-path")
SHORT = {"-cd": "--config-dir", "-cn": "--config-name", "-cp": "--config-path"}


def command(module: str, *words: str | Path) -> str:
    """Return the command line ``python -m module`` with ``words``, which a shell reads as they are."""
    return shlex.join(words_of(module, *words))


def words_of(module: str, *words: str | Path) -> list[str]:
    """Return the words of :func:`command`."""
    return ["python", "-m", module, *map(str, words)]


def for_all_ranks(words: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Return the command that starts ``words`` on all ranks of this process's run, and what has to be said beside it.

    Args:
        words: ``python -m MODULE ...``, what each rank is started with.
        environment: None: that of this process, where torchrun names the ranks.
    """
    known = os.environ if environment is None else environment
    world = known.get("WORLD_SIZE", "1")
    if world == "1":
        return shlex.join(words), ""
    python, *rest = words
    if "TORCHELASTIC_RUN_ID" not in known:
        return shlex.join(words), f", by what started these {world} processes"
    ranks, nodes = known.get("LOCAL_WORLD_SIZE", world), known.get("GROUP_WORLD_SIZE", "1")
    begun = [python, "-m", "torch.distributed.run", "--nproc-per-node", ranks]
    if nodes == "1":
        return shlex.join([*begun, "--standalone", *rest]), ""
    place = ["--master-addr", known["MASTER_ADDR"], "--master-port", known["MASTER_PORT"]]
    node = ["--nnodes", nodes, "--node-rank", known.get("GROUP_RANK", "0"), *place]
    return shlex.join([*begun, *node, *rest]), ", on each node with its own --node-rank"


def override(key: str, value: str | Path) -> str:
    """Return ``key=value`` as Hydra's grammar reads it back: a path with blanks, commas or brackets is quoted."""
    text = str(value)
    path, word = r"[\w.+-]*/[\w/.+-]*", r"(?!(?i:null|true|false|inf|nan)$)[A-Za-z][\w.-]*"  # others may be numbers
    if re.fullmatch(f"{path}|{word}", text, re.ASCII):
        return f"{key}={text}"
    text = text.replace("${", "\\${")  # OmegaConf's own escape
    text = re.sub(r'(\\*)"', r"\1\1\\" + '"', text)  # Hydra: backslashes count before a quotation mark only
    text = re.sub(r"(\\+)$", r"\1\1", text)
    return f'{key}="{text}"'


def config_flags(arguments: Sequence[str] | None = None) -> list[str]:
    """Return what of a command line says where configs are: the same overrides mean nothing without.

    Args:
        arguments: None: those of this process.
    """
    found = []
    left = list(sys.argv[1:] if arguments is None else arguments)
    while left:
        word = left.pop(0)
        name, _, value = word.partition("=")
        full = SHORT.get(name) or next((flag for flag in WHERE_CONFIGS_ARE if _abbreviates(name, flag)), None)
        if full is not None and (value or left):
            found += [full, value or left.pop(0)]
        elif name.lstrip("+") == "hydra.searchpath":
            found.append(word)
    return found


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Put flags before overrides, the order that Hydra's parser wants."""
    overrides = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    return [argument for argument in arguments if argument not in overrides] + overrides


def _abbreviates(name: str, flag: str) -> bool:
    return len(name) > len("--config-") and flag.startswith(name)
