"""Commands as messages print them: quoted for the shell and, where they hold overrides, for Hydra."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

WHERE_CONFIGS_ARE = ("--config-dir", "--config-name", "--config-path")
SHORT = {"-cd": "--config-dir", "-cn": "--config-name", "-cp": "--config-path"}


def command(module: str, *words: str | Path) -> str:
    """Return the command line ``python -m module`` with ``words``, which a shell reads as they are."""
    return shlex.join(["python", "-m", module, *map(str, words)])


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


def _abbreviates(name: str, flag: str) -> bool:
    return len(name) > len("--config-") and flag.startswith(name)
