"""``python -m apt_launch.export RUN --to OUT``: a run's weights as Hugging Face's libraries load them.

The function stays what it is: what a layout has no word for is folded into the weights, and what it cannot hold is refused,
or left out by name, with the difference that this makes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from apt_launch.allow import take_flags
from apt_launch.command_line import say_passed_over
from apt_launch.commands import command, override
from apt_launch.config.corpus import build_corpus
from apt_launch.config.ending import ending
from apt_launch.generate import begin_of_texts, restored
from apt_launch.runs.folder import About, RunFolder, chosen_checkpoint
from apt_launch.secrets import keep_private
from apt_launch.values import read_frozen
from apt_launch.version import __version__
from apt_model.errors import AptError, ConfigError, nearest
from apt_model.files import read_regular, refuse_place, write_atomic, write_json
from apt_model.layouts.architecture import Architecture, ExpertLayers
from apt_model.layouts.families import LAYOUTS, Layout, layout_for
from apt_model.layouts.folder import CONFIG, GENERATION, SEALS
from apt_model.training.checkpoint import read_manifest

if TYPE_CHECKING:
    from apt_model.data.tokenizer import Tokenizer
    from apt_model.gpt import GPT

TOKENIZER: Final = "tokenizer.json"
OF_TOKENIZER: Final = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
"""What may lie beside a ``tokenizer.json``, and goes with it."""

MEASURED: Final = 2048
"""Tokens on which it is measured what leaving something out changes."""


class Optional(NamedTuple):
    """A part of a model that no layout holds, and that can be left out."""

    is_there: Callable[[GPT], bool]
    what: str
    leave_out: Callable[[GPT], None]


def _no_capacity(model: GPT) -> None:
    for layer in model.moe_layers:
        layer.eval_capacity_factor = None


def _has_families(model: GPT) -> bool:
    return any(
        layer.enabled and layer.top_k > 1 and layer.num_families < layer.num_experts for layer in model.moe_layers
    )


def _no_families(model: GPT) -> None:
    for layer in model.moe_layers:
        if layer.router is not None:
            layer.num_families = layer.router.num_families = layer.num_experts


OPTIONAL: Final = {
    "align": Optional(lambda m: m.align.enabled, "alignment's mixture", lambda m: m.align.enable(False)),
    "voter": Optional(lambda m: m.voter.enabled, "votes where the model is unsure", lambda m: m.voter.enable(False)),
    "capacity": Optional(
        lambda m: any(layer.enabled and layer.eval_capacity_factor is not None for layer in m.moe_layers),
        "a capacity of experts in evaluation (moe.eval_capacity_factor)",
        _no_capacity,
    ),
    "families": Optional(
        _has_families,
        "the rule that a token takes one of an expert's copies (experts that have grown, and moe.top_k above 1)",
        _no_families,
    ),
}


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the command line or the run is wrong, 130 interrupted."""
    keep_private()
    with ending():
        _export(parser().parse_args(take_flags(sys.argv[1:])))


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    found = argparse.ArgumentParser(
        prog="python -m apt_launch.export",
        usage="%(prog)s RUN --to OUT [OPTION ...]",
        description="""\
A run's weights as a folder that transformers, vLLM and others load. Logits are
the same: the router's temperature, granularity and the share of a shared expert
are folded into the weights.""",
        epilog="""\
examples:
  python -m apt_launch.export runs/a --to exported --dtype bf16
  python -m apt_launch.export runs/a --to exported --checkpoint best --without align,voter""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = found.add_argument
    add("run", metavar="RUN", type=Path, help="a run's folder, or one of its checkpoints")
    add("--to", type=Path, required=True, metavar="OUT", help="the folder to make")
    add("--layout", default="auto", metavar="NAME", help=f"auto (the first that holds it), {', '.join(LAYOUTS)}")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights (fp32)")
    add("--checkpoint", default="newest", metavar="WHICH", help="newest, best (lowest val/loss) or a step (newest)")
    add("--ema", action="store_true", help="the average of the weights (trainer.ema) instead of the last ones")
    add("--without", default="", metavar="PARTS", help=f"leave out what no layout holds: {','.join(OPTIONAL)}")
    add("--allow", metavar="PACKAGE", help="a package of yours whose classes the run's config may name")
    add("--shard-gb", type=float, default=5.0, metavar="GB", help="size of a file of weights at the most (5)")
    return found


def _export(arguments: argparse.Namespace) -> None:
    without = [part for part in arguments.without.split(",") if part]
    problems = [f"--without: {part!r} is not one of {', '.join(OPTIONAL)}." for part in without if part not in OPTIONAL]
    if arguments.layout not in ("auto", *LAYOUTS):
        problems.append(f"--layout: {arguments.layout!r} is none. {nearest(arguments.layout, ['auto', *LAYOUTS])}")
    if not 0 < arguments.shard_gb < 1 << 20:
        problems.append(f"--shard-gb = {arguments.shard_gb} must be above 0.")
    if problems:
        raise ConfigError(*problems)
    out: Path = arguments.to
    refuse_place(out, "--to")
    if out.is_symlink() or (out.exists() and any(out.iterdir())):
        raise ConfigError(f"--to: {out} is there already. Choose another folder.")
    checkpoint, passed_over = chosen_checkpoint(arguments.run, arguments.checkpoint, key="RUN", option="--checkpoint")
    say_passed_over(passed_over)

    import torch

    from apt_model.gpt import GPT
    from apt_model.layouts.writing import seal, write_weights

    model, tokenizer, _ = restored(checkpoint, torch.device("cpu"), ema=arguments.ema)
    if not isinstance(model, GPT):
        raise ConfigError(
            f"RUN: no layout holds {type(model).__name__}, which is not of this library. Export is for model=gpt and "
            "model=pretrained; others save themselves, from what apt_launch.generate.restored returns."
        )
    run = RunFolder(checkpoint.parent.parent)
    values = read_frozen(run.config)
    difference = _leave_out(model, values, without)
    described = Architecture.of(values["model"], ExpertLayers.of(model))
    layout = layout_for(described, arguments.layout)
    about = _about(run, checkpoint, layout, arguments, difference)

    aside = out.with_name(f".{out.name}.partial.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        pieces = list(layout.tensors(described))
        write_weights(aside, layout, pieces, model.state_dict(), arguments.dtype, int(arguments.shard_gb * 1e9))
        tokens = _write_tokenizer(aside, run, values, tokenizer)
        dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[arguments.dtype]
        write_json(aside / CONFIG, layout.config(described) | {"torch_dtype": dtype, "use_cache": True} | tokens)
        if not (aside / GENERATION).exists():
            write_json(aside / GENERATION, tokens)
        write_atomic(aside / "README.md", _card(about, described, model))
        seal(aside, about)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    except OSError as error:
        raise ConfigError(f"--to: {out} could not be written: {error}.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _report(about, out, len(pieces))


def _leave_out(model: GPT, values: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any] | None:
    """Take what ``without`` names out of ``model``; return what that changes, or None if it is nothing.

    Raises:
        ConfigError: there is something else that no layout holds.
    """
    there = [name for name, part in OPTIONAL.items() if part.is_there(model)]
    kept = [name for name in there if name not in without]
    if kept:
        raise ConfigError(
            *[
                f"{OPTIONAL[name].what}: no layout holds it. Leave it out with --without {','.join(there)}."
                for name in kept
            ]
        )
    if not there:
        return None
    import torch

    tokens, source = _text(model, values)
    model.loss_chunk = None  # all logits are compared
    torch.manual_seed(0)  # votes are drawn
    results = []
    with torch.no_grad():
        for _ in range(2):
            output = model(tokens[:, :-1], tokens[:, 1:], with_metrics=False)
            results.append((output.logits.float().log_softmax(dim=-1), float(output.language_loss)))
            for name in there:
                OPTIONAL[name].leave_out(model)
    (before, loss_before), (after, loss_after) = results
    return {
        "left_out": there,
        "tokens": tokens[:, 1:].numel(),
        "of": source,
        "loss_with": loss_before,
        "loss_without": loss_after,
        "largest_difference": float((before - after).abs().max()),
    }


def _text(model: GPT, values: Mapping[str, Any]) -> tuple[Any, str]:
    """Return tokens to measure on, (batch, seq + 1), and what they are: the run's validation text, or if it is gone noise."""
    import torch

    length = min(model.seq_len, MEASURED)
    rows = max(1, MEASURED // length)
    try:
        found = build_corpus(values["data"]).read("val").array()[: rows * length + 1].astype("int64")
        rows = (len(found) - 1) // length
        if rows:
            windows = [found[row * length : (row + 1) * length + 1] for row in range(rows)]
            return torch.stack([torch.from_numpy(window) for window in windows]), "the run's validation text"
    except AptError:
        pass
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, MEASURED // length), length + 1)
    return torch.randint(model.embedding.num_embeddings, shape, generator=generator), "random tokens"


# --- what lies beside the weights ----------------------------------------------------------------------------------------


def _write_tokenizer(
    folder: Path, run: RunFolder, values: Mapping[str, Any], tokenizer: Tokenizer
) -> dict[str, int | list[int] | None]:
    """Write what transformers needs to know of tokens; return the numbers of those that begin and end texts."""
    from apt_model.layouts.writing import write_byte_tokenizer

    begin = next(iter(begin_of_texts(values, tokenizer)), None)
    numbers: dict[str, int | list[int] | None] = {
        **{"bos_token_id": begin, "eos_token_id": tokenizer.end},
        "pad_token_id": None,
    }
    if tokenizer.content is None:
        write_byte_tokenizer(folder)
    else:
        write_atomic(folder / TOKENIZER, tokenizer.content)
    origin = _origin(values, tokenizer)
    if origin is not None:
        for name in (*OF_TOKENIZER, GENERATION):
            if (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)
        said = json.loads(read_regular(origin / CONFIG))
        numbers = {name: said.get(name) for name in numbers}
    if not (folder / "tokenizer_config.json").exists():
        content: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        content["model_max_length"] = values["model"]["seq_len"]
        names = {number: name for name, number in _vocabulary(folder / TOKENIZER).items()}
        for name, number in (("eos_token", tokenizer.end), ("bos_token", begin)):
            if number is not None:
                content[name] = names[number]
        write_json(folder / "tokenizer_config.json", content)
    return numbers


def _origin(values: Mapping[str, Any], tokenizer: Tokenizer) -> Path | None:
    """Return the folder of the pretrained model that the run began with, if it is here and its tokenizer is the run's."""
    from apt_model.layouts.source import locate

    model = values["model"]
    if "path" not in model:
        return None
    try:
        folder = locate(model["path"], model.get("revision"))
        kept = read_regular(folder / TOKENIZER, 1 << 28).decode("utf-8")
    except (ConfigError, FileNotFoundError, UnicodeDecodeError):
        return None
    return folder if kept == tokenizer.content else None


def _vocabulary(file: Path) -> dict[str, int]:
    content = json.loads(read_regular(file, 1 << 28))
    vocabulary = content["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # of a unigram model: pairs of token and score
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}


def _about(
    run: RunFolder,
    checkpoint: Path,
    layout: Layout,
    arguments: argparse.Namespace,
    difference: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return where the weights come from, as plain values."""
    manifest = read_manifest(checkpoint)
    try:
        origin = json.loads(read_regular(run.provenance))
    except (FileNotFoundError, ConfigError, ValueError):
        origin = {}
    git = origin.get("git") or {}
    return {
        "made_by": f"apt-launch {__version__}",
        "layout": layout.name,
        "dtype": arguments.dtype,
        "average": arguments.ema,
        "run": run.path.absolute().name,
        "identity": About.of(checkpoint, manifest).identity,
        "step": manifest["step"],
        "val/loss": manifest.get("loss"),
        "commit": git.get("commit"),
        "torch": (origin.get("packages") or {}).get("torch"),
        "difference": difference,
    }


def _card(about: Mapping[str, Any], described: Architecture, model: GPT) -> str:
    """Return the model card."""
    experts = described.experts
    parts = ["dense"]
    if experts is not None:
        shared = " and a shared one" if experts.shared_expert else ""
        parts = [f"{experts.num_experts} experts a layer, {experts.top_k} a token{shared}, {experts.router} router"]
        temperatures = ", ".join(f"{value:.6g}" for value in sorted(set(experts.temperatures)))
        parts.append(f"folded into the weights: the router's temperature ({temperatures})")
        if experts.output_scale != 1:
            parts.append(f"and {experts.output_scale:g} times what experts give")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    tags = ["apt-launch", *(["mixture-of-experts"] if experts else [])]
    loss = "" if about["val/loss"] is None else f", validation loss {about['val/loss']:.4f}"
    lines = [
        *(
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            f"tags: [{', '.join(tags)}]",
            "---",
            "",
        ),
        *(f"# {about['run']}", ""),
        f"A language model of {numbers:,} parameters: {', '.join(parts)}.",
        "",
        f"- Written by {about['made_by']} in the layout `{about['layout']}`, weights in {about['dtype']}.",
        f"- From the run `{about['identity']}`, step {about['step']}{loss}.",
        *(
            ["- They are the average that `trainer.ema` kept; the loss is that of the last ones."]
            if about["average"]
            else []
        ),
    ]
    if about["commit"]:
        lines.append(f"- Trained by the commit `{about['commit']}` with torch {about['torch']}.")
    if about["difference"]:
        lines.append(f"- Left out: {_difference(about['difference'])}.")
    lines += [
        f"- `{SEALS}` has the checksum of every file.",
        *("", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
        *(
            'model = AutoModelForCausalLM.from_pretrained(".")',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
            "```",
            "",
        ),
    ]
    return "\n".join(lines)


def _difference(found: Mapping[str, Any]) -> str:
    return (
        f"{' and '.join(found['left_out'])}; on {found['tokens']} tokens of {found['of']} the loss is "
        f"{found['loss_without']:.4f} instead of {found['loss_with']:.4f}, and log-probabilities differ by "
        f"{found['largest_difference']:.3g} at the most"
    )


def _report(about: Mapping[str, Any], out: Path, tensors: int) -> None:
    files = sum(path.suffix == ".safetensors" for path in out.iterdir())
    sys.stdout.write(
        f"{out}: step {about['step']} as {about['layout']} in {about['dtype']}, {tensors} tensors in {files} "
        f"{'file' if files == 1 else 'files'}\n"
    )
    if about["difference"]:
        sys.stdout.write(f"left out: {_difference(about['difference'])}\n")
    load = f'Load it: AutoModelForCausalLM.from_pretrained("{out}")'
    sparse = ["moe=pretrained", "schedule=none", "schedule.enable_moe_at_epoch=0"]
    more = sparse if LAYOUTS[about["layout"]].router else []
    go_on = command("apt_launch", "model=pretrained", override("model.path", out), *more)
    sys.stdout.write(f"{load}, or go on from it: {go_on}\n")
    for left in sorted(out.parent.glob(f".{escape(out.name)}.partial.*")):
        sys.stderr.write(f"left by an export that did not end, and of no use unless one is under way: {left}\n")


if __name__ == "__main__":
    main()
