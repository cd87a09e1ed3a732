"""Writes a folder of a layout: weights in shards, ``config.json``, tokenizer, and the checksum of each file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from apt_model.data.tokenizer import END
from apt_model.errors import ConfigError
from apt_model.files import sha256, write_atomic, write_json
from apt_model.layouts.families import Layout, Piece
from apt_model.layouts.folder import INDEX, SEALS, WEIGHTS

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_weights(
    folder: Path, layout: Layout, pieces: Sequence[Piece], state: Mapping[str, Tensor], dtype: str, shard_bytes: int
) -> None:
    """Write the tensors of ``layout``, made of our ``state``, in files of about ``shard_bytes``, with an index if several.

    Raises:
        OSError: a file could not be written.
        ConfigError: there are numbers that ``dtype`` has no room for.
    """
    shards: list[list[Piece]] = [[]]
    sizes = [0]
    for piece in pieces:
        size = _kind(layout, piece, dtype).itemsize
        for length in piece.shape:
            size *= length
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(piece)
        sizes[-1] += size
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = [WEIGHTS] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        made = {piece.theirs: _in_kind(_made(piece, state), _kind(layout, piece, dtype), piece) for piece in shard}
        try:
            save_file(made, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # what the system said, without its number
            raise OSError(str(error)) from None
    if len(shards) > 1:
        places = {piece.theirs: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(places.items()))})


def _kind(layout: Layout, piece: Piece, dtype: str) -> torch.dtype:
    """Return in what the piece is written: what chooses experts stays in float32, as those who read it have it."""
    if layout.router_bias is not None and piece.theirs.endswith(layout.router_bias):
        return torch.float32
    return DTYPES[dtype]


def _in_kind(tensor: Tensor, kind: torch.dtype, piece: Piece) -> Tensor:
    """Return the tensor in ``kind``.

    Raises:
        ConfigError: there are numbers that are not finite there, and were here.
    """
    found = tensor.to(kind)
    if tensor.numel() and not torch.stack(found.aminmax()).isfinite().all():
        if torch.stack(tensor.aminmax()).isfinite().all():
            largest = tensor.abs().max().item()
            raise ConfigError(f"--dtype: {piece.theirs} has {largest:g}, which {kind} has no room for. Choose bf16.")
        raise ConfigError(f"RUN: {piece.ours} has numbers that are not finite. Choose an earlier --checkpoint.")
    return found


def _made(piece: Piece, state: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor of its own, on the CPU."""
    if piece.ours is None:
        return torch.zeros(piece.shape)
    found = state[piece.ours].detach()
    part = (found if piece.part is None else found[piece.part]).cpu()
    if piece.scale != 1.0:
        return (part.double() * piece.scale).to(part.dtype)
    return part.clone(memory_format=torch.contiguous_format)


def write_byte_tokenizer(folder: Path) -> None:
    """Write a ``tokenizer.json`` whose tokens are bytes of UTF-8, numbered as themselves; 0 ends a text."""
    # GPT-2's letters for bytes: printable ones stand for themselves, others for what comes after all bytes
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    letters[0] = END
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content: dict[str, Any] = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [{"id": 0, "content": END, **special}],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **{"fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
            "vocab": {letters[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }
    write_atomic(folder / "tokenizer.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def seal(folder: Path, more: Mapping[str, Any]) -> None:
    """Write down size and checksum of every file that there is, and ``more``."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != SEALS
    }
    write_json(folder / SEALS, {**more, "files": files})
