"""Composes, checks, launches and records runs of curriculum-trained mixture-of-experts language models."""

__version__ = "0.1.0"
