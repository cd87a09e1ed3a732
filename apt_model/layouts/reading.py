"""Weights of a folder, taken into a model tensor by tensor: beside the model's own there is one more in memory."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from apt_model.errors import ConfigError
from apt_model.layouts.folder import WeightsFolder


@torch.no_grad()
def read_weights(folder: WeightsFolder, model: nn.Module) -> None:
    """Give ``model``, which is made for the folder's architecture, the folder's weights.

    Raises:
        ConfigError: a file is damaged, or has something that the model has not.
    """
    folder.check_seals()
    pieces = folder.pieces
    own = model.state_dict()
    with ExitStack() as stack:
        opened: dict[Any, Any] = {}
        for piece in pieces:
            file = folder.stored[piece.theirs].file
            try:
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                tensor = opened[file].get_tensor(piece.theirs)
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{folder.key}: {file} is damaged: {error}.") from None
            if not torch.isfinite(tensor).all():
                raise ConfigError(f"{folder.key}: {piece.theirs} has numbers that are not finite. Fetch {file} again.")
            if piece.ours is None:
                if tensor.any():
                    raise ConfigError(f"{folder.key}: {piece.theirs} has no counterpart here, unless it is zero.")
                continue
            target = own[piece.ours] if piece.part is None else own[piece.ours][piece.part]
            target.copy_(tensor)
