"""Weights of a folder, taken into a model tensor by tensor: beside the model's own there is one more in memory."""

from __future__ import annotations

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
    own = model.state_dict()
    for piece in folder.pieces:
        file = folder.stored[piece.theirs].file
        try:
            with safe_open(file, framework="pt") as opened:  # anew for each: what was read of a file stays mapped
                tensor = opened.get_tensor(piece.theirs)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{folder.key}: {file} is damaged: {error}.") from None
        if not torch.stack(tensor.aminmax()).isfinite().all():  # makes nothing of the tensor's size
            raise ConfigError(f"{folder.key}: {piece.theirs} has numbers that are not finite. Fetch {file} again.")
        if piece.ours is None:
            if tensor.any():
                raise ConfigError(f"{folder.key}: {piece.theirs} has no counterpart here, unless it is zero.")
            continue
        target = own[piece.ours] if piece.part is None else own[piece.ours][piece.part]
        target.copy_(tensor if piece.scale == 1.0 else tensor.double() / piece.scale)
