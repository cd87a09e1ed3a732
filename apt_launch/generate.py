"""``python -m apt_launch.generate RUN_DIR --prompt TEXT``: text from a run's checkpoint.

The newest checkpoint that is whole is taken, with the modules that were enabled at its time. Text goes to standard output, the
rest to standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apt_launch.allow import take_flags
from apt_launch.command_line import say_passed_over
from apt_launch.config.catalogue import modules
from apt_launch.config.corpus import build_corpus
from apt_launch.config.ending import ending
from apt_launch.config.instantiate import build, build_model
from apt_launch.config.load import parse_groups
from apt_launch.escapes import visible
from apt_launch.runs.folder import About, find_checkpoint
from apt_launch.secrets import keep_private
from apt_launch.values import read_frozen
from apt_model.data.tokenizer import ByteTokenizer, load_tokenizer
from apt_model.errors import AptError, ConfigError
from apt_model.files import read_regular
from apt_model.schedule.targets import OF_OPTIMIZER
from apt_model.training.checkpoint import read_manifest

if TYPE_CHECKING:
    import torch

    from apt_model.data.tokenizer import Tokenizer
    from apt_model.generation import Generated

LOWEST_TEMPERATURE: Final = 1e-30
"""Above 0: logits divided by less overflow."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the command line or the folder is wrong, 130 interrupted."""
    keep_private()
    with ending():
        _generate(parser().parse_args(take_flags(sys.argv[1:])))


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    found = argparse.ArgumentParser(
        prog="python -m apt_launch.generate",
        usage="%(prog)s RUN_DIR [--prompt TEXT ...] [OPTION ...]",
        description="""\
Text from a run's newest checkpoint, with the modules enabled at its time.
It goes to standard output; speed and votes go to standard error.""",
        epilog="""\
examples:
  python -m apt_launch.generate runs/a --prompt 'def ' --prompt 'class ' --top-k 40
  python -m apt_launch.generate runs/a/checkpoints/step-00000128 --prompt 'def '""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = found.add_argument
    add("folder", metavar="RUN_DIR", type=Path, help="a run's folder, or one of its checkpoints")
    add("--prompt", action="append", metavar="TEXT", help="what the text begins with; again for more, in one batch")
    add("--prompt-file", type=Path, metavar="FILE", help="a prompt a line")
    add("--num-samples", type=int, default=1, metavar="N", help="texts for each prompt (1)")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="tokens added to a prompt at most (200)")
    add("--temperature", type=float, default=0.8, metavar="T", help="of the draw; 0: always the likeliest token (0.8)")
    add("--top-k", type=int, metavar="K", help="draw only from the K likeliest tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw only from the likeliest that sum to P (1)")
    add("--voter", choices=("auto", "on", "off"), default="auto", help="entropy voting; auto: as the run had it")
    add("--vote-threshold", type=float, metavar="NATS", help="entropy above which there are votes; else the run's")
    add("--seed", type=int, default=0, metavar="N", help="of draws and votes (0)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    add("--allow", metavar="PACKAGE", help="a package of yours whose classes the run's config may name")
    add("--ema", action="store_true", help="the average of the weights that trainer.ema kept")
    add("--json", action="store_true", help="for programs: a line of JSON for each text")
    return found


def _generate(arguments: argparse.Namespace) -> None:
    prompts = _prompts(arguments)
    checkpoint, passed_over = find_checkpoint(arguments.folder, "RUN_DIR")
    say_passed_over(passed_over)
    import torch

    from apt_model.generation import Sampling, generate
    from apt_model.training.subject import Rereader

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    device = device_named(arguments.device)
    model, tokenizer, seq_len = restored(checkpoint, device, ema=arguments.ema)
    voter: Any = getattr(model, "voter", None)
    if voter is None and (arguments.voter != "auto" or arguments.vote_threshold is not None):
        raise ConfigError("--voter: this run's model has none. Leave --voter and --vote-threshold out.")
    if arguments.voter != "auto":
        voter.enable(arguments.voter == "on")
    if arguments.vote_threshold is not None:
        voter.threshold.fill_(arguments.vote_threshold)
    begin = begin_of_texts(read_frozen(checkpoint.parent.parent / "config.yaml"), tokenizer)
    torch.manual_seed(arguments.seed)
    watched = len(prompts) == 1 and not arguments.json and sys.stdout.isatty()
    shown = _Shown(tokenizer, prompts[0]) if watched else None
    generated = generate(
        model if callable(getattr(model, "next_logits", None)) else Rereader(model, seq_len),
        [[*begin, *tokenizer.encode(prompt)] for prompt in prompts],
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        num_tokens=tokenizer.vocab_size,
        end=tokenizer.end,
        on_token=shown.add if shown else lambda prompt, token: None,
    )
    if shown:
        sys.stdout.write("\n")
    else:
        _write(prompts, generated, tokenizer, as_json=arguments.json)
    sys.stderr.write(_summary(generated, checkpoint, model) + "\n")


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """Return the prompts that were given, each as often as there are texts asked for.

    Raises:
        ConfigError: there are none, one is empty, or a number makes no sense.
    """
    prompts: list[str] = list(arguments.prompt or [])
    if arguments.prompt_file is not None:
        try:
            prompts += read_regular(arguments.prompt_file, remedy="name a file of text").decode("utf-8").splitlines()
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file: {error}") from None
    problems = []
    if not prompts:
        problems.append("--prompt: there is none. Say how the text begins: --prompt 'def '")
    if not all(prompts):
        problems.append("--prompt: one is empty. Say how the text begins: --prompt 'def '")
    problems += [
        f"--{name.replace('_', '-')} = {getattr(arguments, name)} must be {least} or more."
        for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("seed", 0))
        if getattr(arguments, name) < least
    ]
    problems += [
        f"--{name.replace('_', '-')} = {getattr(arguments, name)} must be at most {most}."
        for name, most in (
            ("seed", (1 << 63) - 1),
            ("max_new_tokens", 1 << 31),
            ("num_samples", 1 << 20),
            ("top_k", 1 << 31),
        )
        if (getattr(arguments, name) or 0) > most
    ]
    if arguments.vote_threshold is not None and not math.isfinite(arguments.vote_threshold):
        problems.append(f"--vote-threshold = {arguments.vote_threshold} must be a finite number.")
    if 0 < arguments.temperature < LOWEST_TEMPERATURE:
        problems.append(
            f"--temperature = {arguments.temperature} must be 0 (always the likeliest token), or {LOWEST_TEMPERATURE} or more."
        )
    if problems:
        raise ConfigError(*problems)
    return [prompt for prompt in prompts for _ in range(arguments.num_samples)]


def device_named(name: str) -> torch.device:
    """Return the device that ``--device`` names.

    Raises:
        ConfigError: it is none, or is not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise ConfigError(f"--device = {name!r} is not one of auto, cpu, cuda or cuda:N.")
    from apt_model.training.device import choose_device

    return choose_device(name, key="--device")


def restored(checkpoint: Path, device: torch.device, *, ema: bool = False) -> tuple[Any, Tokenizer, int]:
    """Return a run's model as it was at ``checkpoint``, what its tokens mean, and the length of its sequences.

    Args:
        ema: whether to take the average of the weights that ``trainer.ema`` kept.

    Raises:
        ConfigError: the run's config is missing or wrong, or its tokenizer; or it has no average.
        CheckpointError: the checkpoint is damaged.
    """
    from apt_model.training.saved_state import read_state
    from apt_model.training.schedule_driver import bind, restore_model
    from apt_model.training.subject import take_lineage

    path = checkpoint.parent.parent / "config.yaml"
    values = read_frozen(path)
    groups, _ = parse_groups(values)
    horizon = About.of(checkpoint, read_manifest(checkpoint)).horizon
    model = build_model(values)
    schedule = build(values["schedule"], horizon=horizon, modules=modules(values))
    bind(schedule, model, more=dict.fromkeys(OF_OPTIMIZER, lambda value: None))
    state = read_state(checkpoint)
    if ema:
        if "ema" not in state:
            raise ConfigError(
                f"--ema: {checkpoint} has no average of the weights. Train with trainer.ema=0.999, for instance."
            )
        state["model"] = state["model"] | state["ema"]
    restore_model(model, schedule, state)
    schedule.reconcile()
    take_lineage(model)
    kept = path.with_name("tokenizer.json")
    tokenizer = load_tokenizer(kept) if kept.exists() else ByteTokenizer()
    return model.to(device).eval(), tokenizer, groups["model"].seq_len


def begin_of_texts(values: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Return the token that each text began with in the run whose config is ``values``, or none.

    Of shards, which were made by another config, the first token says so, as long as they are there.
    """
    if tokenizer.begin is None:
        return []
    if "bos" in values["data"]:
        return [tokenizer.begin] if values["data"]["bos"] else []
    import numpy as np

    try:
        first = build_corpus(values["data"]).read("train").windows(np.zeros(1, dtype=np.int64), 1)
    except AptError:
        return []
    return [tokenizer.begin] if int(first[0, 0]) == tokenizer.begin else []


class _Shown:
    """Shows a text as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: str) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.written = 0
        sys.stdout.write(visible(prompt))

    def add(self, prompt: int, token: int) -> None:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens).rstrip("\ufffd")  # a character may take several tokens
        sys.stdout.write(visible(text[self.written :]))
        sys.stdout.flush()
        self.written = max(self.written, len(text))


def _write(prompts: Sequence[str], generated: Generated, tokenizer: Tokenizer, *, as_json: bool) -> None:
    for number, (prompt, tokens) in enumerate(zip(prompts, generated.tokens, strict=True)):
        text = tokenizer.decode(tokens)
        if as_json:
            sys.stdout.write(json.dumps({"prompt": prompt, "text": text, "tokens": len(tokens)}) + "\n")
        else:
            whole = visible(prompt + text) if sys.stdout.isatty() else prompt + text  # a program gets it as it is
            sys.stdout.write(("---\n" if number else "") + whole + "\n")


def _summary(generated: Generated, checkpoint: Path, model: Any) -> str:
    """Return what was done, in one line."""
    on = [name for name, is_on in _modules(model).items() if is_on]
    votes = f", {generated.voted_fraction:.0%} voted on" if "voter" in on else ""
    return (
        f"{checkpoint.name} ({' + '.join(on) or 'dense'}): {sum(map(len, generated.tokens))} tokens at "
        f"{generated.tokens_per_second:,.0f} a second{votes}; {generated.prompt_tokens} of the prompts in "
        f"{generated.prompt_seconds:.2f} s"
    )


def _modules(model: Any) -> dict[str, bool]:
    from apt_model.layers.in_place import moe_layers

    parts = {name: getattr(model, name, None) for name in ("align", "voter")}
    return {
        "moe": any(layer.enabled for layer in moe_layers(model)),
        **{name: part is not None and part.enabled for name, part in parts.items()},
    }


if __name__ == "__main__":
    main()
