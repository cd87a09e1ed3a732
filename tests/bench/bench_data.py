"""What the loader costs beside a training step, and how fast tokens are made. Run: ``python -m tests.bench.bench_data [STEPS]``.

The default run's model takes steps, in turn, on batches of bytes in memory, of shards that the system has in memory, and of
shards that it has just forgotten and reads from the disk. A loader's share is its part of the time between two steps.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import numpy as np

from apt_launch.build import build_trainer
from apt_launch.config import composed
from apt_model.data import Sampler, StdlibCorpus
from apt_model.data.batches import Batches
from apt_model.data.corpora import DocumentCorpus, Split
from apt_model.data.shards import Shards, write
from apt_model.data.tokenizer import ByteTokenizer, Tokenizer, train_tokenizer
from apt_model.data.tokens import Tokens
from apt_model.training.trainer import Trainer

ON = ("schedule.enable_moe_at_epoch=0", "schedule.enable_align_at_epoch=0", "schedule.enable_voter_at_epoch=0")
KINDS = ("bytes in memory", "shards, warm", "shards, cold")
SIZE = 1 << 28
"""Bytes of the shards that are loaded from."""


def forget(folder: Path) -> None:
    """Have the system forget what it holds of the files in ``folder``; they must not be mapped."""
    for path in folder.glob("*.bin"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loading(trainer: Trainer, tokens: Tokens, steps: int) -> tuple[float, float]:
    """Take ``steps`` on batches of ``tokens``; return the median seconds of the loader, and of a step."""
    old = trainer.train_batches.sampler
    sampler = Sampler(num_tokens=len(tokens), seq_len=old.seq_len, batch_size=old.batch_size, seed=0)
    batches = Batches(tokens, sampler).epoch(0)
    loaded, stepped = [], []
    for _ in range(steps):
        began = time.perf_counter()
        batch = next(batches)
        loaded.append(time.perf_counter() - began)
        trainer.begin_update()
        trainer.step([batch])
        trainer.end_update()
        stepped.append(time.perf_counter() - began - loaded[-1])
    return statistics.mean(loaded[1:]), statistics.median(stepped)


def load(folder: Path, steps: int) -> None:
    """Print what the loader takes of a step."""
    trainer = build_trainer(composed([*ON, "trainer.max_epochs=1000"]), log=lambda row: None)
    written = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint16)
    shards = folder / "shards"
    shards.mkdir()
    for number, part in enumerate(np.split(written, 4)):
        with (shards / f"{number}.bin").open("wb") as file:
            file.write(part.data)
            os.fsync(file.fileno())

    def mapped() -> Tokens:
        import mmap

        maps = []
        for path in sorted(shards.glob("*.bin")):
            with path.open("rb") as file:
                maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return Tokens([np.frombuffer(map_, dtype="<u2") for map_ in maps], maps)

    print(f"{steps} steps of {trainer.train_batches.sampler.batch_size} x {trainer.model.seq_len} tokens each")
    for kind in KINDS:
        if kind == "bytes in memory":
            tokens = Tokens([written.astype(np.uint8)])
        else:
            if kind == "shards, cold":
                forget(shards)
            tokens = mapped()
        took, step = loading(trainer, tokens, steps)
        batch = trainer.train_batches.sampler.batch_size * trainer.model.seq_len
        print(
            f"{kind:16} loader {took * 1e6:8.1f} us a batch = {batch / took:14,.0f} tokens/s, model {step * 1e3:7.1f} ms = "
            f"{batch / step:8,.0f} tokens/s: the loader takes {took / step:.3%} of a step"
        )
        del tokens


def make(folder: Path) -> None:
    """Print how fast shards of the standard library are made, and how fast a tokenizer is trained."""
    corpus = StdlibCorpus()
    text = [document.text for document in corpus.documents("train")]
    began = time.perf_counter()
    bpe = train_tokenizer(text, 8192)
    took = time.perf_counter() - began
    print(f"\nBPE of {bpe.vocab_size} tokens trained on {sum(map(len, text)) / 1e6:.1f} M characters in {took:.1f} s")
    for name, tokenizer in (("bytes", ByteTokenizer()), ("BPE", bpe)):
        began = time.perf_counter()
        write(folder / name, cast("DocumentCorpus", corpus), cast("Tokenizer", tokenizer), key="", told=corpus.told)
        took = time.perf_counter() - began
        opened = time.perf_counter()
        shards = Shards(folder / name)
        tokens = sum(shards.count(split) for split in cast("tuple[Split, Split]", ("train", "val")))
        opened = time.perf_counter() - opened
        checked = time.perf_counter()
        shards.check()
        checked = time.perf_counter() - checked
        print(
            f"{name:6} {tokens:10,} tokens in {took:5.2f} s = {tokens / took:12,.0f} a second; counted in "
            f"{opened * 1e3:.1f} ms, checked in {checked * 1e3:.1f} ms"
        )


def main(steps: int) -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        load(Path(name), steps)
        make(Path(name))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
