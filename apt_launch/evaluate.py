"""``python -m apt_launch.evaluate RUN [data=...]``: the loss of a run's checkpoint on text, its own or another.

In the place of a run may stand a folder of Hugging Face's, such as :mod:`apt_launch.export` writes.

Each token is predicted once, in windows of the run's sequence length; what is left at the end, less than a window, is not. It is
the cross-entropy that is measured, whatever loss the run had.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from apt_launch.allow import take_flags
from apt_launch.command_line import parsed, say_passed_over
from apt_launch.config.corpus import build_corpus, making_tokens
from apt_launch.config.ending import ending
from apt_launch.config.load import composing, load_data
from apt_launch.config.pretrained import with_tokenizer
from apt_launch.generate import device_named, restored
from apt_launch.runs.folder import chosen_checkpoint
from apt_launch.secrets import keep_private
from apt_launch.values import read_frozen
from apt_model.data.borders import Borders, split_windows
from apt_model.data.tokenizer import FILE_NAME, Tokenizer, load_tokenizer
from apt_model.errors import ConfigError
from apt_model.files import read_regular
from apt_model.ignored import IGNORED
from apt_model.layouts.folder import CONFIG, WeightsFolder

BITS: Final = 1 / math.log(2)
"""Of a nat."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the command line, the folder or the text is wrong, 130 interrupted."""
    keep_private()
    with ending():
        sys.argv[1:] = take_flags(sys.argv[1:])
        _evaluate(*parsed(parser()))


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    found = argparse.ArgumentParser(
        prog="python -m apt_launch.evaluate",
        usage="%(prog)s RUN_DIR [OPTION ...] [data=... ...]",
        description="""\
Loss, perplexity and bits a byte of a run's checkpoint on text: the run's own
validation split, or that of the data that overrides name. Also of a pretrained
model in a folder, exported or downloaded, which transformers loads.""",
        epilog="""\
examples:
  python -m apt_launch.evaluate runs/a --which best
  python -m apt_launch.evaluate runs/a data=text data.path=my_texts --split train
  python -m apt_launch.evaluate exported --seq-len 512 data=text data.path=my_texts""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = found.add_argument
    add("folder", metavar="RUN_DIR", type=Path, help="a run's folder, one of its checkpoints, or a folder of weights")
    add(
        "--which",
        default="newest",
        metavar="WHICH",
        help="newest (default), best (lowest val/loss), or a number of updates",
    )
    add("--split", choices=("val", "train"), default="val", help="of the text (val)")
    add("--seq-len", type=int, metavar="N", help="tokens of a window; the run's, of a folder of weights 1024 at most")
    add("--batch-size", type=int, default=16, metavar="N", help="sequences at once (16)")
    add("--max-batches", type=int, metavar="N", help="at the most; all unless said otherwise")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    add("--allow", metavar="PACKAGE", help="a package of yours whose classes the run's config may name")
    add("--ema", action="store_true", help="the average of the weights that trainer.ema kept")
    add("--json", action="store_true", help="for programs: one JSON object")
    return found


def _evaluate(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    if any(size is not None and size < 1 for size in (arguments.batch_size, arguments.max_batches, arguments.seq_len)):
        raise ConfigError("--batch-size, --max-batches and --seq-len: they must be 1 or more.")
    if others := [one for one in overrides if not one.lstrip("+~").startswith(("data=", "data."))]:
        raise ConfigError(f"{others[0]}: only the group data can be another here. The rest is as the run has it.")
    device = device_named(arguments.device)
    of_weights = (arguments.folder / CONFIG).is_file()
    if of_weights:
        checkpoint = run = arguments.folder
        model, tokenizer, longest, values = _of_weights(arguments, device, overrides)
        seq_len = min(longest, 1024)
    else:
        if overrides and not any(one.lstrip("+").startswith("data=") for one in overrides):
            raise ConfigError(
                f"{overrides[0]}: say of which data it is, too: data=text data.path=..., for instance. Without any, the "
                "run's own are measured."
            )
        checkpoint, passed_over = chosen_checkpoint(arguments.folder, arguments.which, key="RUN_DIR", option="--which")
        say_passed_over(passed_over)
        run = checkpoint.parent.parent
        model, tokenizer, longest = restored(checkpoint, device, ema=arguments.ema)
        seq_len = longest
        values = read_frozen(run / "config.yaml")["data"]
        if overrides:
            with composing() as compose:
                values = load_data(compose(overrides))
    seq_len = arguments.seq_len or seq_len
    if seq_len > longest:
        raise ConfigError(f"--seq-len = {seq_len}: the model is meant for {longest} tokens at the most.")
    corpus = build_corpus(values)
    kept, now = run / "tokenizer.json", corpus.tokenizer_file
    if kept.exists() != (now is not None) or (now is not None and read_regular(kept) != read_regular(now)):
        raise ConfigError(
            f"data: its tokens are not those of the run, whose tokenizer is {kept if kept.exists() else 'bytes'}. Set "
            f"data.tokenizer={kept if kept.exists() else 'null'}."
        )
    corpus.check()
    with making_tokens(corpus):
        tokens = corpus.read(arguments.split)
    measured = measure(
        model,
        tokens,
        tokenizer,
        seq_len=seq_len,
        batch_size=arguments.batch_size,
        limit=arguments.max_batches,
        device=device,
        borders=corpus.borders,
    )
    found = {"checkpoint": str(checkpoint), "split": arguments.split, **measured}
    if arguments.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    sys.stdout.write(
        f"{checkpoint.name} on {measured['tokens']:,} tokens of {arguments.split}: loss {measured['loss']:.4f} nats a token, "
        f"perplexity {measured['perplexity']:.2f}, {measured['bits_per_byte']:.4f} bits a byte\n"
    )
    for name, loss in measured["sources"].items():
        sys.stdout.write(f"  {name}: loss {loss:.4f}\n")


def _of_weights(
    arguments: argparse.Namespace, device: Any, overrides: Sequence[str]
) -> tuple[Any, Tokenizer, int, dict[str, Any]]:
    """Return the model of a folder of weights, its tokenizer, the longest text that it is meant for, and the group ``data``.

    Raises:
        ConfigError: the folder is damaged, or transformers cannot load it.
    """
    if arguments.ema or arguments.which != "newest":
        raise ConfigError(f"--which and --ema: {arguments.folder} is no run; it has one set of weights.")
    if find_spec("transformers") is None:
        raise ConfigError(
            f"RUN_DIR: {arguments.folder} is loaded by transformers, which cannot be found. Run: pip install 'apt-launch[hf]'"
        )
    folder = WeightsFolder(arguments.folder, key="RUN_DIR")
    folder.check_seals()
    folder.stored  # noqa: B018 - says what is cut off or damaged
    with composing() as compose:
        values = with_tokenizer(load_data(compose(overrides)), folder)
    from apt_model.integrations.transformers import load_folder

    model = load_folder(folder.path)
    longest = folder.config.get("max_position_embeddings")
    tokenizer = load_tokenizer(folder.path / FILE_NAME)
    return model.to(device).eval(), tokenizer, longest if isinstance(longest, int) else 1024, values


def measure(
    model: Any,
    tokens: Any,
    tokenizer: Any,
    *,
    seq_len: int,
    batch_size: int,
    limit: int | None,
    device: Any,
    borders: Borders | None = None,
) -> dict[str, Any]:
    """Return loss (nats a token), perplexity, bits a byte, the number of tokens, and the loss of each source by name.

    Where documents do not see each other, as ``borders`` says, the first token of one is not counted.

    Raises:
        ConfigError: there is less than one sequence, or the model gives no logits.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from apt_model.data import Sampler
    from apt_model.training.subject import Forward

    if chunk := getattr(model, "loss_chunk", None):  # as few logits at once as in training, but those of each token
        model.loss_chunk, batch_size = None, min(batch_size, max(1, chunk // seq_len))
    windows = max(0, len(tokens) - 1) // seq_len
    sampler = Sampler(
        num_tokens=len(tokens), seq_len=seq_len, batch_size=min(batch_size, max(1, windows)), seed=0, name="text"
    )
    begins = np.arange(sampler.num_windows, dtype=np.int64) * seq_len
    forward = Forward(model, borders=borders)
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    total, number = 0.0, 0
    stream: list[Any] = []
    spoken: list[Any] = []
    with torch.inference_mode():
        for start in list(range(0, len(begins), batch_size))[:limit]:
            here = begins[start : start + batch_size]
            window = torch.from_numpy(tokens.windows(here, seq_len + 1)).to(device)
            given, targets = split_windows(window, borders)
            counted = (targets != IGNORED).cpu().numpy()
            logits = forward(model, given, targets, with_metrics=False).logits
            if logits is None:
                raise ConfigError(
                    f"{type(model).__name__} gives no logits, and each token's loss is wanted. Have it return (logits, loss)."
                )
            losses = (
                F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
                .double()
                .cpu()
                .numpy()
            )
            total += float(losses.sum())
            number += int(counted.sum())
            stream.append(window[:, 1:].cpu().numpy().ravel())
            spoken.append(counted.ravel())
            if tokens.sources is not None:
                sources = tokens.sources.of(here + 1, seq_len).flatten()
                for place, name in enumerate(tokens.sources.names):
                    mine = losses[(sources == place) & counted.flatten()]
                    sums[name] = sums.get(name, 0.0) + float(mine.sum())
                    counts[name] = counts.get(name, 0) + mine.size
    loss = total / number
    size = tokenizer.num_bytes(np.concatenate(stream), np.concatenate(spoken))
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total * BITS / max(1, size),
        "tokens": number,
        "sources": {name: sums[name] / counts[name] for name in sums if counts[name]},
    }


if __name__ == "__main__":
    main()
