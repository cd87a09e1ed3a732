"""Files in llama.cpp's format, by way of transformers, which knows how each family's tensors are turned and named there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from apt_model.errors import ConfigError
from apt_model.files import in_home

KEY = "model.path"


def converted(file: Path) -> Path:
    """Return a folder with the model and the tokenizer of ``file``, converted once and kept in the user's cache folder.

    Raises:
        ConfigError: libraries are missing, or transformers cannot read the file.
    """
    about = file.stat()
    name = hashlib.sha256(json.dumps([str(file.absolute()), about.st_size, about.st_mtime_ns]).encode()).hexdigest()[
        :32
    ]
    folder = in_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache", KEY) / "apt_launch" / f"gguf-{name}"
    if not folder.exists():
        missing = [name for name in ("transformers", "gguf") if find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"{KEY}: {file} is read by transformers with the package gguf, and {' and '.join(missing)} cannot be found. Run: "
                "pip install 'apt-launch[hf]' gguf"
            )
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            aside.mkdir(parents=True)
            where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            model.hf_quantizer = None  # its weights are dequantised, and may be written
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(aside)
            del model
            AutoTokenizer.from_pretrained(**where).save_pretrained(aside)
            if not folder.exists():
                aside.rename(folder)
        except Exception as error:  # of two libraries, about a file of any kind
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"{KEY}: transformers cannot read {file}: {reason[0].rstrip('.')}.") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder
