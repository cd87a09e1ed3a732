"""Completion in bash, zsh and fish: ``apt-launch -sc install=SHELL`` prints the script that asks this module.

``python -m apt_launch.cli.completion LINE`` prints what the last word of LINE, the command up to the cursor, may become: a whole
word a line. It reads ``conf/`` as it is; neither Hydra nor torch is loaded.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from apt_launch.config.menu import COMMANDS, entry_point, groups, keys

FLAGS: Final = (
    "--allow",
    "--cfg",
    "--config-dir",
    "--config-name",
    "--config-path",
    "--dry-run",
    "--help",
    "--hydra-help",
    "--info",
    "--multirun",
    "--package",
    "--resolve",
    "--shell-completion",
    "--version",
)
AFTER: Final = {
    "--cfg": ("all", "hydra", "job"),
    "-c": ("all", "hydra", "job"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "-i": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "-sc": tuple(f"{verb}={shell}" for verb in ("install", "uninstall") for shell in ("bash", "fish", "zsh")),
    "--config-dir": (),
}
"""What may follow a flag; nothing said: files."""

TAKES_OVERRIDES: Final = ("apt_launch", "apt_launch.preview", "apt_launch.tokenize")


def answer(line: str) -> list[str]:
    """Return what the last word of ``line`` may become; nothing where the command is none of ours."""
    words = _words(line)
    start = _start(words)
    if start is None:
        return []
    module, (*given, word) = start
    if module is None:
        return [name for name in ("apt_launch", *COMMANDS) if name.startswith(word)]
    offered: Iterable[str]
    actions = _actions(module, given)
    flags = {flag: action for action in actions for flag in action.option_strings}
    if module == "apt_launch" and given and given[-1] in AFTER:
        offered = AFTER[given[-1]] or _files(word)
    elif word.startswith("-"):
        offered = FLAGS if module == "apt_launch" else flags
    elif given and given[-1] in flags and flags[given[-1]].nargs != 0:
        offered = flags[given[-1]].choices or _files(word)
    elif module == "apt_launch.sweep" and not given:
        offered = next(action.choices or () for action in actions if action.choices)
    elif module in TAKES_OVERRIDES:
        offered = overrides(word, given)
    else:
        offered = _files(word)
    return sorted({offer for offer in map(str, offered) if offer.startswith(word)})


def _words(line: str) -> list[str]:
    """Split as a shell does; the last word is what stands before the cursor, perhaps nothing."""
    for closing in ("", '"', "'"):
        try:
            words = shlex.split(line + closing)
        except ValueError:
            continue
        return [*words, ""] if not closing and line[-1:].isspace() else words
    return line.split()


def _start(words: list[str]) -> tuple[str | None, list[str]] | None:
    """Return the module that ``words`` call, None while it is being written, and what follows it; None: none of ours."""
    for at, word in enumerate(words[:-1]):
        if Path(word).name == "apt-launch":
            return "apt_launch", words[at + 1 :]
        if word == "-m" and at and words[at + 1].startswith("apt_launch"):
            return (None if at + 2 == len(words) else words[at + 1]), words[at + 2 :] or words[at + 1 :]
    return None


def overrides(word: str, given: Iterable[str] = ()) -> list[str]:
    """Return the overrides that ``word`` may be the begin of, where ``given`` stands before it."""
    sign = word[:1] if word[:1] in ("+", "~") else ""
    bare = word.lstrip("+~")
    known = groups()
    chosen = {name: value for name, _, value in (one.lstrip("+").partition("=") for one in given) if name in known}
    key, equals, value = bare.partition("=")
    if not equals:
        entries = keys(chosen)
        below = {_level(key, bare) for key in entries if key.startswith(bare)}
        choices = {f"{name}=" for name in known if name.startswith("sweeps") == (sign == "+")}
        return [sign + offer for offer in (below if sign != "+" else set()) | choices]
    before, comma, _ = value.rpartition(",")
    if key in known:
        values: Iterable[str] = known[key].options
    else:
        entry = keys(chosen).get(key)
        if entry is None:
            return []
        values = entry.choices or ([] if comma else [entry.value] if _plain(entry.value) else _files(value))
    return [f"{sign}{key}={before}{comma}{offer}" for offer in values]


def _level(key: str, written: str) -> str:
    """Return ``key`` up to the next dot after what is written of it; with ``=`` where it ends."""
    dot = key.find(".", len(written))
    return f"{key}=" if dot < 0 else key[: dot + 1]


def _plain(value: str) -> bool:
    return value not in ("null", "???") and "$" not in value


def _files(word: str) -> list[str]:
    """Return the files and folders that ``word`` may be the begin of; folders end with a slash."""
    at = word.rfind("/") + 1
    folder, name = word[:at], word[at:]
    try:
        entries = list(Path(folder or ".").expanduser().iterdir())
    except (OSError, RuntimeError):  # no such folder, or no home
        return []
    return [
        f"{folder}{entry.name}" + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry.name.startswith(name) and (name or not entry.name.startswith("."))
    ]


def _actions(module: str, given: list[str]) -> list[argparse.Action]:
    """Return what the command ``module`` takes, or the one of its own commands that was ``given``."""
    if module not in COMMANDS:
        return []
    actions: list[argparse.Action] = importlib.import_module(entry_point(module)).parser()._actions
    for action in actions:
        if isinstance(action, argparse._SubParsersAction) and given and given[0] in action.choices:
            return list(action.choices[given[0]]._actions)
    return actions


SCRIPTS: Final = {
    "bash": """
_apt_launch() {
    local line="${COMP_LINE:0:COMP_POINT}" word IFS=$'\\n'
    word="${line##*[[:space:]]}"
    COMPREPLY=($(PYTHON -m apt_launch.cli.completion "$line" 2>/dev/null))
    case "${COMPREPLY[0]}" in *[=./]) compopt -o nospace 2>/dev/null ;; esac
    word="${word%"${word##*[=:]}"}"  # readline takes what follows these for another word
    [[ "$COMP_WORDBREAKS" == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"$word"}")
}
_apt_launch_python() {
    local word before
    for word in "${COMP_WORDS[@]:1:COMP_CWORD}"; do
        [[ "$before" == -m && "$word" == apt_launch* ]] && { _apt_launch; return; }
        before="$word"
    done
    [[ -n "$_apt_launch_before" ]] && "$_apt_launch_before" "$@"
}
_apt_launch_before="$(complete -p python 2>/dev/null || { _completion_loader python && complete -p python; } 2>/dev/null)"
[[ "$_apt_launch_before" =~ -F\\ ([^ ]+) ]] && _apt_launch_before="${BASH_REMATCH[1]}" || _apt_launch_before=
[[ "$_apt_launch_before" == _apt_launch* ]] && _apt_launch_before=
complete -F _apt_launch apt-launch
complete -o bashdefault -o default -F _apt_launch_python python python3
""",
    "zsh": """
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
_apt_launch() {
    local -a found open
    found=("${(@f)$(PYTHON -m apt_launch.cli.completion "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    open=(${(M)found:#*[=./]})
    (( $#open )) && compadd -U -S '' -a open
    found=(${found:#*[=./]})
    (( $#found )) && compadd -U -a found
}
_apt_launch_python() {
    if [[ "${words[(I)apt_launch*]}" -gt 2 && "${words[${words[(I)apt_launch*]}-1]}" == -m ]]; then
        _apt_launch
    elif [[ -n "$_apt_launch_before" ]]; then
        $_apt_launch_before "$@"
    else
        _files
    fi
}
[[ "${_comps[python]}" == _apt_launch* ]] || _apt_launch_before="${_comps[python]}"
compdef _apt_launch apt-launch
compdef _apt_launch_python python python3
""",
    "fish": """
function __apt_launch
    PYTHON -m apt_launch.cli.completion (commandline -cp | string collect) 2>/dev/null
end
function __apt_launch_python
    commandline -cp | string match -qr -- '-m +apt_launch'
end
complete -c apt-launch -f -k -a '(__apt_launch)'
for name in python python3
    complete -c $name -f -k -n __apt_launch_python -a '(__apt_launch)'
end
""",
}
REMOVAL: Final = {
    "bash": "complete -r apt-launch python python3",
    "zsh": "compdef -d apt-launch python python3",
    "fish": "complete -e -c apt-launch; functions -e __apt_launch __apt_launch_python",
}


def script(request: str) -> str:
    """Return what the shell is to run for ``install=SHELL`` or ``uninstall=SHELL``.

    Raises:
        ValueError: there is no such request, or no such shell.
    """
    verb, _, shell = request.partition("=")
    if verb not in ("install", "uninstall") or shell not in SCRIPTS:
        raise ValueError(
            f"-sc {request}: there is no such completion. Say install= or uninstall=, then bash, zsh or fish."
        )
    if verb == "uninstall":
        return REMOVAL[shell]
    return SCRIPTS[shell].strip().replace("PYTHON", shlex.quote(sys.executable))


if __name__ == "__main__":
    sys.stdout.write("".join(f"{found}\n" for found in answer(" ".join(sys.argv[1:]))))
