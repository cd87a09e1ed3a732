"""Where a pretrained model is: a folder here, a name on the Hugging Face hub, or a file in llama.cpp's format."""

from __future__ import annotations

import re
from pathlib import Path

from apt_model.errors import ConfigError
from apt_model.files import in_home

KEY = "model.path"
NEEDED = ("*.json", "*.safetensors", "*.jinja")
"""What is fetched from the hub."""


def locate(path: str, revision: str | None = None) -> Path:
    """Return the folder that ``path`` means; what is elsewhere is fetched or converted once, and kept.

    Args:
        path: a folder, a ``.gguf`` file, or ``owner/name`` on the hub.
        revision: commit, tag or branch on the hub; None: the newest.

    Raises:
        ConfigError: there is no such thing, or it cannot be fetched.
    """
    here = in_home(path, KEY)
    if here.is_dir():
        return here
    if here.suffix == ".gguf":
        if not here.is_file():
            raise ConfigError(f"{KEY}: there is no file {path!r} (looked in {Path.cwd()}).")
        from apt_model.layouts.gguf import converted

        return converted(here)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path, re.ASCII):
        raise ConfigError(
            f"{KEY}: there is no folder {path!r} (looked in {Path.cwd()}). Name a folder as transformers saves it, a .gguf file, "
            "or owner/name on the Hugging Face hub."
        )
    return _from_hub(path, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{KEY}: there is no folder {name!r} here, and huggingface_hub, which would fetch it, cannot be found. Run: pip "
            "install 'apt-launch[hf]'"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(NEEDED)))
    except Exception as error:  # of the network, of the hub, of the disk: none of a common kind
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{KEY}: there is no folder {name!r} (looked in {Path.cwd()}), and it cannot be fetched from the Hugging Face hub: "
            f"{reason[0].rstrip('.')}."
        ) from None
