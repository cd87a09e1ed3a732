"""A folder of weights as it lies on the disk: its files, what is in them, whether they are whole. Torch stays unloaded."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

from apt_model.errors import ConfigError, nearest
from apt_model.files import STRICT, from_json, open_regular, read_regular, sha256
from apt_model.layouts.architecture import Architecture
from apt_model.layouts.families import LAYOUTS, Layout, Piece

CONFIG: Final = "config.json"
GENERATION: Final = "generation_config.json"
INDEX: Final = "model.safetensors.index.json"
WEIGHTS: Final = "model.safetensors"
ADAPTER: Final = "adapter_config.json"
SEALS: Final = "apt_launch.json"
"""With size and checksum of every file of a folder that was written here."""

LONGEST_HEADER: Final = 100 << 20
"""Bytes, as the library safetensors has it."""

BYTES: Final = {"F32": 4, "BF16": 2, "F16": 2}
"""Kinds of numbers that are read, and how long each is."""

UNUSED: Final = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that older folders have, and nobody needs."""


class Stored(NamedTuple):
    """Where a tensor is."""

    file: Path
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class _Seal:
    """The schema of one file in :data:`SEALS`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Seals:
    """The schema of :data:`SEALS`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True}

    files: dict[str, _Seal]


class WeightsFolder:
    """A folder with ``config.json`` and weights in safetensors.

    Args:
        path: the folder.
        key: where the user named it.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, path: Path, key: str = "model.path") -> None:
        self.path = path
        self.key = key
        if not path.is_dir():
            raise ConfigError(f"{key}: there is no folder {str(path)!r} (looked in {Path.cwd()}).")

    def _json(self, name: str) -> Any:
        path = self.path / name
        try:
            return json.loads(read_regular(path))
        except FileNotFoundError:
            remedy = "Name a folder as transformers saves it."
            if (self.path / ADAPTER).exists():
                remedy = (
                    "It is an adapter, which goes with another model. Let peft merge both: "
                    "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OTHER)."
                )
            raise ConfigError(f"{self.key}: {self.path} has no {name}. {remedy}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.key}: {path} is no JSON: {error}.") from None

    @cached_property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` says.

        Raises:
            ConfigError: it is missing or no JSON.
        """
        found = self._json(CONFIG)
        if not isinstance(found, dict):
            raise ConfigError(f"{self.key}: {self.path / CONFIG} is no mapping.")
        return found

    @cached_property
    def layout(self) -> Layout:
        """What family it is of.

        Raises:
            ConfigError: one that is not read here.
        """
        name = str(self.config.get("model_type"))
        if name not in LAYOUTS:
            raise ConfigError(
                f"{self.key}: {self.path / CONFIG}: model_type = {name!r} has no counterpart here. {nearest(name, LAYOUTS)}"
            )
        return LAYOUTS[name]

    @cached_property
    def architecture(self) -> Architecture:
        """The model.

        Raises:
            ConfigError: it has no counterpart here.
        """
        return self.layout.read(self.config, f"{self.key}: {self.path / CONFIG}")

    @cached_property
    def files(self) -> list[Path]:
        """The files of weights, in order.

        Raises:
            ConfigError: there are none, or the index is damaged.
        """
        if (self.path / INDEX).exists():
            index = self._json(INDEX)
            names = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ConfigError(f"{self.key}: {self.path / INDEX} has no weight_map of names to files.")
            files = sorted(set(names.values()))
        else:
            files = [WEIGHTS]
        for name in files:
            if Path(name).name != name or not (self.path / name).is_file():
                remedy = (
                    f"{INDEX} names it: fetch the folder again."
                    if files != [WEIGHTS]
                    else "Weights are read from safetensors; others transformers converts: "
                    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)."
                )
                raise ConfigError(f"{self.key}: {self.path} has no file {name!r}. {remedy}")
        return [self.path / name for name in files]

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """Every tensor by name, from the files' headers, which agree with the files' sizes.

        Raises:
            ConfigError: a file is cut off or damaged.
        """
        found: dict[str, Stored] = {}
        for file in self.files:
            header, _ = self._header(file)
            end = 0
            for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, size = about["data_offsets"][0], BYTES.get(about["dtype"], 0)
                for length in about["shape"]:
                    size *= length
                if begin != end or (about["dtype"] in BYTES and about["data_offsets"][1] - begin != size):
                    raise ConfigError(f"{self.key}: {file} is damaged: {name} is not where its header says.")
                end = about["data_offsets"][1]
                found[name] = Stored(file, tuple(about["shape"]), about["dtype"])
            header_bytes = self._header(file)[1]
            if file.stat().st_size != header_bytes + end:
                raise ConfigError(
                    f"{self.key}: {file} has {file.stat().st_size:,} bytes instead of {header_bytes + end:,}: it is cut off or "
                    "damaged. Fetch it again."
                )
        return found

    def _header(self, file: Path) -> tuple[dict[str, Any], int]:
        """Return what the header of a file of weights says of each tensor, and how many bytes it has."""
        try:
            with open_regular(file) as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                if length > LONGEST_HEADER:
                    raise ValueError("its header is too long")
                header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            for about in header.values():
                numbers = [*about["shape"], *about["data_offsets"]]
                if (
                    not all(type(number) is int and number >= 0 for number in numbers)
                    or len(about["data_offsets"]) != 2
                ):
                    raise ValueError("its header has other things than lengths")
                if not isinstance(about["dtype"], str):
                    raise ValueError("its header has no names for kinds of numbers")
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{self.key}: {file} is no file of safetensors, or damaged: {error}.") from None
        return header, 8 + length

    @cached_property
    def pieces(self) -> list[Piece]:
        """What the model is made of; each is stored, in its shape, and nothing else is.

        Raises:
            ConfigError: something is missing, too much or of another shape.
        """
        model = self.architecture
        parts = model.num_layers * (model.experts.num_experts if model.experts else 1)
        if parts > len(self.stored):  # before a list of them is made
            raise ConfigError(
                f"{self.key}: {self.path} has {len(self.stored)} tensors, which are too few for what {CONFIG} says of layers and "
                "experts."
            )
        pieces = list(self.layout.tensors(model))
        wanted, problems = {piece.theirs: piece for piece in pieces}, []
        for name, piece in wanted.items():
            if name not in self.stored:
                problems.append(f"{self.key}: {self.path} has no tensor {name!r}.")
            elif self.stored[name].shape != piece.shape:
                problems.append(f"{self.key}: {name} has the shape {self.stored[name].shape} instead of {piece.shape}.")
            elif self.stored[name].kind not in BYTES:
                problems.append(
                    f"{self.key}: {name} is of {self.stored[name].kind}; read are {', '.join(BYTES)}. Quantised weights have "
                    "to be dequantised first."
                )
        left_out = ("lm_head.weight",) if model.tie_embeddings else ()
        for name in self.stored:
            if name not in wanted and name not in left_out and not name.endswith(UNUSED):
                problems.append(f"{self.key}: the tensor {name!r} has no counterpart here.")
        if problems:
            raise ConfigError(*problems[:8], *([f"... and {len(problems) - 8} more."] if len(problems) > 8 else []))
        return pieces

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of ``config.json`` and of names, sizes and headers of the files of weights, which is quickly known."""
        digest = hashlib.sha256(read_regular(self.path / CONFIG))
        for file in self.files:
            about = [file.name, file.stat().st_size, *sorted(self._header(file)[0].items())]
            digest.update(json.dumps(about, sort_keys=True).encode())
        return digest.hexdigest()

    def check_seals(self) -> None:
        """Compare every file with its checksum, where the folder has them.

        Raises:
            ConfigError: one is missing, or is not what was written.
        """
        path = self.path / SEALS
        if not path.exists():
            return
        seals = from_json(read_regular(path), _Seals, where=str(path), remedy="Export the run again.")
        for name, seal in seals.files.items():
            file = self.path / name
            if Path(name).name != name or not file.is_file():
                raise ConfigError(
                    f"{self.key}: {self.path} has no file {name!r}, which {SEALS} names. Export the run again."
                )
            if file.stat().st_size != seal.bytes or sha256(file) != seal.sha256:
                raise ConfigError(
                    f"{self.key}: {file} is not what was written: it differs from its checksum in {SEALS}. Export the run again, "
                    f"or remove {SEALS} if you changed it yourself."
                )
