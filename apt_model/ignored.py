"""The target of a position that counts nowhere."""

from typing import Final

IGNORED: Final = -100
"""Padding, what is masked, a document's first token: no part of losses and metrics. As torch and transformers have it."""
