"""A model that begins with the weights of a folder."""

from __future__ import annotations

from typing import Any

from apt_model.errors import ConfigError
from apt_model.gpt import GPT
from apt_model.layouts.folder import WeightsFolder
from apt_model.layouts.reading import read_weights
from apt_model.layouts.source import locate


class PretrainedGPT(GPT):
    """A GPT of a folder's sizes, which :meth:`load_pretrained` gives the folder's weights.

    Args:
        path, revision: see :func:`~apt_model.layouts.source.locate`.
        weights: the folder's :attr:`~WeightsFolder.fingerprint`, when the run was planned.
        max_seq_len: the longest text that the model is meant for.
        sparse: whether the folder's feed-forward layers are experts, so that those here are enabled before its weights come.
        sizes: see :class:`GPT`.
    """

    def __init__(
        self, *, path: str, revision: str | None, weights: str, max_seq_len: int, sparse: bool = False, **sizes: Any
    ) -> None:
        super().__init__(**sizes)
        self.path = path
        self.revision = revision
        self.weights = weights
        self.sparse = sparse

    def load_pretrained(self) -> None:
        """Take up the folder's weights.

        Raises:
            ConfigError: the folder is gone, damaged, or another one than when the run was planned.
        """
        folder = WeightsFolder(locate(self.path, self.revision))
        if folder.pieces and folder.fingerprint != self.weights:
            raise ConfigError(
                f"model.path: the files in {folder.path} are not those that the run was planned with (model.weights). Start "
                "from a config that names model.path alone."
            )
        if self.sparse:
            self.enable_moe(True)
            self.take_lineage()
        read_weights(folder, self)
