"""The corpus that a config describes: built, counted to know a run's length; how far its tokens are made is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from apt_launch.config.instantiate import ALLOWED, build, factory
from apt_model.errors import ConfigError

if TYPE_CHECKING:
    from apt_model.data import Corpus
    from apt_model.schedule import Horizon

Counts = dict[str, int]
"""Tokens of a corpus: its config and a split as JSON, to their number."""


def build_corpus(values: Mapping[str, Any]) -> Corpus:
    """Return the corpus that the ``data`` group describes; no text is read.

    Raises:
        ConfigError: its values make no sense together.
    """
    target = values.get("_target_")
    if target in ALLOWED:
        corpus: Corpus = build(values)
        return corpus
    from apt_model.data.own import OwnCorpus

    make = factory(values)
    return OwnCorpus(make, str(target).rpartition(".")[2], values.get("pack"))


def plan_horizon(values: Mapping[str, Any], groups: Mapping[str, Any], corpus: Corpus, counts: Counts) -> Horizon:
    """Return the run's planned length; the corpus is counted, unless ``counts`` has it.

    Raises:
        ConfigError: a file is missing or wrong, or the text does not fill one batch.
    """
    from apt_model.data import Sampler
    from apt_model.schedule import Horizon

    trainer, model = groups["trainer"], groups["model"]
    batches = {}
    for split, limit in (("train", trainer.max_batches_per_epoch), ("val", trainer.validation_batches)):
        counted = json.dumps([values["data"], split])
        if counted not in counts:
            with making_tokens(corpus):
                counts[counted] = corpus.count(split)  # type: ignore[arg-type]
            row: int | None = getattr(corpus, "row_tokens", None)
            if row not in (None, model.seq_len + 1):
                raise ConfigError(
                    f"model.seq_len = {model.seq_len} takes rows of {model.seq_len + 1} tokens, and those of the {split} split "
                    f"have {row}. Set model.seq_len={row - 1 if row else 0}, or make other rows."
                )
        sampler = Sampler(
            num_tokens=counts[counted],
            seq_len=model.seq_len,
            batch_size=trainer.batch_size,
            seed=values["seed"],
            limit=limit,
            name=split,
        )
        batches[split] = sampler.num_batches
    return Horizon.plan(
        epochs=trainer.max_epochs,
        batches_per_epoch=batches["train"],
        accumulate=trainer.accumulate,
        batch_size=trainer.batch_size,
        tokens_per_sample=model.seq_len,
    )


@contextmanager
def making_tokens(corpus: Corpus) -> Iterator[None]:
    """Show how far the corpus' tokens are made, if they have to be made meanwhile."""
    progress: Any = None

    def show(split: str, done: float, tokens: int) -> None:
        nonlocal progress
        if progress is None:
            from apt_launch.config.token_progress import TokenProgress

            progress = TokenProgress()
        progress.show(split, done, tokens)

    corpus.on_progress = show
    try:
        yield
    finally:
        del corpus.on_progress
        if progress is not None:
            progress.close()
