"""Which piece of a corpus makes which batch: a pure function of seed, epoch and place, with nothing to save."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apt_model.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Sampler:
    """Cuts a corpus into windows of ``seq_len`` tokens and shuffles them anew each epoch.

    Batch b of epoch e is a slice of permutation(seed, e), so any place of a run can be found again without state. What
    does not fill a batch is left for other epochs.

    Args:
        num_tokens: length of the corpus.
        limit: batches an epoch at the most; None: all.
        name: what the corpus is called in errors.

    Raises:
        ConfigError: the corpus does not fill one batch.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        seq_len: int,
        batch_size: int,
        seed: int,
        limit: int | None = None,
        name: str = "train",
    ) -> None:
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.num_windows = max(0, num_tokens - 1) // seq_len  # each window has one token more: its last target
        self.num_batches = self.num_windows // batch_size
        if not self.num_batches:
            raise ConfigError(
                f"data: the {name} split has {num_tokens} tokens, less than one batch: trainer.batch_size {batch_size} x "
                f"model.seq_len {seq_len} + 1 = {batch_size * seq_len + 1}. Bring more text, or set one of them lower."
            )
        if limit is not None:
            self.num_batches = min(self.num_batches, limit)
        self._latest: tuple[int, NDArray[np.int64]] | None = None

    def windows(self, epoch: int) -> NDArray[np.int64]:
        """Return where the windows of ``epoch`` begin, in their order: (num_batches, batch_size)."""
        import numpy as np

        if self._latest is not None and self._latest[0] == epoch:  # validation asks for one and the same
            return self._latest[1]
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_windows)
        taken = order[: self.num_batches * self.batch_size].reshape(self.num_batches, self.batch_size)
        windows = taken.astype(np.int64) * self.seq_len
        windows.flags.writeable = False
        self._latest = (epoch, windows)
        return windows
