"""``python -m apt_launch.tokenize OUT [overrides]``: a corpus as memory-mapped shards of tokens, for ``data=shards``.

The corpus is that of a run with the same overrides. OUT is whole or not there; what was cut off is continued there, by
the same command. Torch is not loaded.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apt_launch.command_line import parsed
from apt_launch.commands import command, override
from apt_launch.config.checks import missing_library
from apt_launch.config.corpus import build_corpus, making_tokens
from apt_launch.config.ending import ending
from apt_launch.config.load import composing, load_data
from apt_launch.secrets import keep_private
from apt_model.errors import ConfigError
from apt_model.files import refuse_place

if TYPE_CHECKING:
    from apt_model.data.corpora import DocumentCorpus
    from apt_model.data.tokenizer import Tokenizer

TRAINED_ON = 1 << 30
"""Characters of the training split, from its begin, that a tokenizer is trained on at the most."""

MOST: Final = (1 << 31) - 1
"""Tokens of a vocabulary or of a file, at the most."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 command line, data or disk wrong, 130 interrupted."""
    keep_private()
    with ending():
        arguments, overrides = parsed(parser())
        try:
            _tokenize(arguments, overrides)
        except KeyboardInterrupt:
            sys.stderr.write(f"interrupted. Go on with: {command('apt_launch.tokenize', *sys.argv[1:])}\n")
            sys.stderr.flush()
            raise


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    found = argparse.ArgumentParser(
        prog="python -m apt_launch.tokenize",
        usage="%(prog)s OUT [OPTION ...] [OVERRIDE ...]",
        description="""\
Make memory-mapped shards of a corpus, which runs then read without making its
tokens again. Overrides name the corpus, as for python -m apt_launch. What was
cut off is continued there, by the same command.""",
        epilog="""\
examples:
  python -m apt_launch.tokenize shards/ data=text data.path=my_texts/
  python -m apt_launch.tokenize shards/ --train-tokenizer 8192 data=text data.path=my_texts/
  python -m apt_launch data=shards data.path=shards/ model.vocab_size=8192""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("out", metavar="OUT", type=Path, help="a folder that is not there yet")
    found.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="VOCAB",
        help="train a byte-level BPE tokenizer of so many tokens on the corpus first; else data.tokenizer, or bytes",
    )
    found.add_argument("--shard-tokens", type=int, metavar="N", help="tokens of a file (134217728)")
    return found


def _tokenize(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from apt_model.data.shard_writer import SHARD_TOKENS, write
    from apt_model.data.shards import MANIFEST, SPLITS, Shards

    out: Path = arguments.out
    if "=" in out.name:
        raise ConfigError(
            f"OUT: {str(out)!r} is an override. Name the folder first: python -m apt_launch.tokenize OUT data=..."
        )
    if not out.name or out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError(
            f"OUT: {str(out)!r} is the folder that you are in, or holds it. Name one that is not there yet."
        )
    refuse_place(out, "OUT")
    for flag, given in (("--train-tokenizer", arguments.train_tokenizer), ("--shard-tokens", arguments.shard_tokens)):
        if given is not None and given > MOST:
            raise ConfigError(f"{flag} = {given} must be at most {MOST}.")
    if (out / MANIFEST).exists():
        train = shlex.join(["data=shards", override("data.path", out)])
        raise ConfigError(f"OUT: {out} holds shards already. Train from them by {train}, or choose another folder.")
    shard_tokens = SHARD_TOKENS if arguments.shard_tokens is None else arguments.shard_tokens
    if shard_tokens < 1:
        raise ConfigError(f"--shard-tokens = {shard_tokens} must be 1 or more.")
    corpus = _corpus(overrides)
    tokenizer = (
        corpus.tokenizer if arguments.train_tokenizer is None else _trained(corpus, arguments.train_tokenizer, out)
    )
    with making_tokens(corpus):
        write(out, corpus, tokenizer, key="OUT", on_progress=corpus.on_progress, shard_tokens=shard_tokens)
    made = Shards(out, key="OUT")
    counts = ", ".join(f"{made.count(split):,} of {split}" for split in SPLITS)
    needed = [f"model.vocab_size={made.vocab_size}"] if made.tokenizer_file else []
    train = command("apt_launch", "data=shards", override("data.path", out), *needed)
    sys.stdout.write(f"{out}: {counts}, {made.vocab_size} kinds of tokens. Train: {train}\n")


def _corpus(overrides: list[str]) -> DocumentCorpus:
    """Return the corpus that a run with ``overrides`` would have.

    Raises:
        ConfigError: it has no documents, or its config is wrong.
    """
    from apt_model.data.corpora import DocumentCorpus

    with composing() as compose:
        corpus = build_corpus(load_data(compose(overrides)))
    if not isinstance(corpus, DocumentCorpus):
        raise ConfigError("data: it has tokens already, and no documents. Choose data=text, jsonl, stdlib or hf.")
    return corpus


def _trained(corpus: DocumentCorpus, vocab_size: int, out: Path) -> Tokenizer:
    """Return a tokenizer trained on the corpus; the same each time, so that what was cut off can be continued.

    Raises:
        ConfigError: there is one already, it is too small, or the text cannot be read.
    """
    from apt_model.data.tokenizer import train_tokenizer

    if corpus.tokenizer_file is not None:
        raise ConfigError("--train-tokenizer: data.tokenizer names one already. Leave one of them out.")
    problem = missing_library("--train-tokenizer", "tokenizers", ("tokenizers",), "leave it out: tokens are bytes then")
    if problem:
        raise ConfigError(problem)
    sys.stderr.write(f"training a tokenizer of {vocab_size} tokens ...\n")
    result: list[Any] = []

    def train() -> None:
        try:
            result.append(train_tokenizer(texts(), vocab_size))
        except BaseException as error:
            result.append(error)

    def texts() -> Iterator[str]:
        read = 0
        for document in corpus.documents("train"):
            yield document.text
            read += len(document.text)
            if read >= TRAINED_ON:
                return

    thread = threading.Thread(target=train, daemon=True)  # the library does not react to Ctrl-C, and this thread does
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if isinstance(result[0], BaseException):
        raise result[0]
    tokenizer: Tokenizer = result[0]
    return tokenizer


if __name__ == "__main__":
    main()
