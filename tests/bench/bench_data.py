"""What the loader costs beside a training step, and how fast tokens are made and found again.

The default run's model, with every module on, takes steps in turn on batches of bytes in memory, of shards that the system
has in memory, and of shards that it has just forgotten and reads from the disk, ahead of time or not; the loader's share is
its time over that of the steps. Run: ``python -m tests.bench.bench_data [STEPS]``.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from apt_launch.config.load import composed
from apt_launch.runs.build import build_trainer
from apt_model.data import Sampler, StdlibCorpus, TextCorpus
from apt_model.data.batches import Batches
from apt_model.data.corpora import ByteCorpus
from apt_model.data.shard_writer import write
from apt_model.data.shards import Shards
from apt_model.data.tokenizer import ByteTokenizer, Tokenizer, train_tokenizer
from apt_model.data.tokens import Tokens
from apt_model.training.trainer import Trainer

ON = ("schedule.enable_moe_at_epoch=0", "schedule.enable_align_at_epoch=0", "schedule.enable_voter_at_epoch=0")
COPIES = 20
"""Of the standard library's text, in the shards that batches are loaded from: some 230 MB."""


def make(folder: Path, corpus: ByteCorpus, name: str, tokenizer: Tokenizer) -> Shards:
    """Make shards, and print how fast."""
    began = time.perf_counter()
    write(folder, corpus, tokenizer, key="OUT", on_progress=corpus.on_progress)
    made = time.perf_counter()
    shards = Shards(folder)
    tokens = shards.count("train") + shards.count("val")
    counted = time.perf_counter()
    shards.check()
    checked = time.perf_counter()
    print(
        f"{name:18} {tokens:12,} tokens made in {made - began:6.2f} s = {tokens / (made - began):12,.0f} a second, "
        f"counted in {(counted - made) * 1e3:.1f} ms, checked in {(checked - counted) * 1e3:.0f} ms"
    )
    return shards


def forget(shards: Shards) -> None:
    """Have the system forget what it holds of the files; they must not be mapped."""
    for path in shards.folder.glob("*.bin"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(trainer: Trainer, name: str, tokens: Tokens, steps: int) -> None:
    """Take ``steps`` on batches of ``tokens``, and print what the loader took of them."""
    own = trainer.train_batches.sampler
    sampler = Sampler(num_tokens=len(tokens), seq_len=own.seq_len, batch_size=own.batch_size, seed=0)
    batches = Batches(tokens, sampler).epoch(0)
    next(batches)
    loaded, stepped = [], []
    for _ in range(steps):
        began = time.perf_counter()
        batch = next(batches)
        loaded.append(time.perf_counter() - began)
        trainer.begin_update()
        trainer.step([batch])
        trainer.end_update()
        stepped.append(time.perf_counter() - began - loaded[-1])
    size = own.batch_size * own.seq_len
    load, step = statistics.mean(loaded), statistics.mean(stepped)
    print(
        f"{name:18} loader {size / load:12,.0f} tokens/s ({load * 1e6:6.0f} us a batch, {max(loaded) * 1e6:6.0f} at most), "
        f"model {size / step:8,.0f} tokens/s: {load / step:.3%} of a step"
    )


def main(steps: int) -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder, stdlib = Path(name), StdlibCorpus()
        texts = [document.text for document in stdlib.documents("train")]
        began = time.perf_counter()
        bpe = train_tokenizer(texts, 8192)
        characters = sum(map(len, texts))
        print(
            f"BPE of {bpe.vocab_size} trained on {characters / 1e6:.1f} M characters in {time.perf_counter() - began:.1f} s"
        )
        make(folder / "bpe", stdlib, "standard library", bpe)
        (folder / "text").mkdir()
        for copy in range(COPIES):
            (folder / "text" / f"{copy}.txt").write_text("".join(texts))
        large = make(folder / "bytes", TextCorpus(path=str(folder / "text")), f"{COPIES} times, bytes", ByteTokenizer())

        trainer = build_trainer(composed([*ON, "trainer.max_epochs=1000"]), log=lambda row: None)
        print(f"\n{steps} steps each of {trainer.train_batches.sampler.batch_size} x {trainer.model.seq_len} tokens")
        load(trainer, "(warm-up)", trainer.train_batches.tokens, 2)
        load(trainer, "bytes in memory", trainer.train_batches.tokens, steps)
        load(trainer, "shards, warm", large.read("train"), steps)
        forget(large)
        load(trainer, "shards, cold", large.read("train"), steps)
        forget(large)
        load(trainer, "not read ahead", Tokens(large.read("train").parts), steps)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
