"""What is right by itself and wrong together: values of different groups, a curriculum in its run, what is not installed.

Each check reports all that it finds. Torch stays unloaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apt_launch.config import catalogue, own, schema
from apt_launch.config.corpus import build_corpus
from apt_launch.config.schema import EXTRAS, HFConfig, LaunchConfig
from apt_model.data.borders import takes_no_documents
from apt_model.errors import ConfigError, nearest

if TYPE_CHECKING:
    from apt_model.data import Corpus
    from apt_model.schedule import Curriculum, Horizon, Program


def check_together(values: Mapping[str, Any], groups: Mapping[str, Any], launch: LaunchConfig) -> Corpus:
    """Check values that are right each by itself against each other; return the corpus, whose vocabulary is one of them.

    Raises:
        ConfigError: with every problem found.
    """
    model, moe, schedule, optimizer = (groups[name] for name in ("model", "moe", "schedule", "optimizer"))
    problems = _attention_problems(model) if isinstance(model, schema.GPTConfig) else []
    if moe.top_k > moe.num_experts:
        problems.append(f"moe.top_k = {moe.top_k} is more than moe.num_experts = {moe.num_experts}.")
    problems += _expert_problems(model, moe)
    if moe.capacity_factor is None and schedule.moe_capacity is not None:
        problems.append(
            "moe.capacity_factor is null (dropless), but schedule.moe_capacity anneals it. Set schedule.moe_capacity=null, "
            "or give moe.capacity_factor a number."
        )
    ranks = launch.nodes * launch.tasks_per_node
    if groups["trainer"].batch_size % ranks:
        problems.append(
            f"trainer.batch_size = {groups['trainer'].batch_size} cannot be shared by {ranks} ranks (launch.nodes x "
            f"launch.tasks_per_node). Make it a multiple of {ranks}."
        )
    problems += _sharing_problems(groups, ranks)
    problems += schedule.contradictions()
    problems += _growth_problems(schedule, moe)
    missing = missing_libraries(groups)
    problems += missing
    corpus = None
    if not missing:
        try:
            corpus = build_corpus(values["data"])
            size = model.vocab_size if isinstance(model, schema.GPTConfig) else catalogue.vocab_size(values)
            if size is not None:
                problems += _vocabulary_problems(corpus, size)
            problems += _bound_problems(corpus, groups["trainer"].batch_size, model.seq_len)
            problems += _packing_problems(corpus, values, model)
        except ConfigError as error:
            problems += error.problems
    problems += _trainer_problems(groups["trainer"], drill=launch.drill)
    problems += _clip_problems(groups["trainer"], model)
    if launch.stop.rungs and not problems and launch.stop.metric not in (known := catalogue.metrics(values)):
        problems.append(
            f"launch.stop.metric: no job records {launch.stop.metric!r}. {nearest(launch.stop.metric, known)}"
        )
    if optimizer.weight_decay * optimizer.lr >= 1:
        problems.append(
            f"optimizer.weight_decay x optimizer.lr = {optimizer.weight_decay * optimizer.lr:g}: one update would erase the "
            "weights. Their product must be below 1."
        )
    if problems or corpus is None:
        raise ConfigError(*problems)
    return corpus


def _attention_problems(model: schema.GPTConfig) -> list[str]:
    """Say why there could be no such heads."""
    problems, heads, shared, scaling = [], model.num_heads, model.num_kv_heads, model.rope_scaling
    if model.head_dim is None and model.d_model % (2 * heads):
        problems.append(
            f"model.d_model = {model.d_model} does not give {heads} heads (model.num_heads) of an even width, which rotary "
            f"positions need. Make it a multiple of {2 * heads}, or set model.head_dim."
        )
    if model.head_dim is not None and model.head_dim % 2:
        problems.append(f"model.head_dim = {model.head_dim} is odd, and rotary positions turn pairs of channels.")
    if shared is not None and heads % shared:
        problems.append(
            f"model.num_kv_heads = {shared} does not divide model.num_heads = {heads}. Choose a divisor, such as "
            f"{math.gcd(shared, heads)}, or null."
        )
    if isinstance(scaling, schema.Llama3ScalingConfig) and scaling.low_freq_factor >= scaling.high_freq_factor:
        problems.append(
            f"model.rope_scaling.low_freq_factor = {scaling.low_freq_factor:g} must be below high_freq_factor = "
            f"{scaling.high_freq_factor:g}."
        )
    return problems


def _expert_problems(model: schema.Group, moe: schema.MoEConfig) -> list[str]:
    """Return why experts could not begin as the dense layer that is to be cut into them."""
    slices, problems = moe.granularity, []
    if isinstance(model, schema.GPTConfig) and model.d_ff % slices:
        problems.append(
            f"moe.granularity = {slices} does not divide model.d_ff = {model.d_ff}. Choose a divisor of it, such as "
            f"{math.gcd(slices, model.d_ff)}."
        )
    if moe.num_experts % slices or moe.num_experts < 2 * slices:
        problems.append(
            f"moe.num_experts = {moe.num_experts} is not two or more whole copies of the dense layer: with moe.granularity = "
            f"{slices}, {slices} experts are one. Experts are counted singly: as many weights as {moe.num_experts} whole "
            f"copies have moe.num_experts={moe.num_experts * slices}."
        )
    if moe.top_k % slices:
        problems.append(
            f"moe.top_k = {moe.top_k} does not reach whole copies of the dense layer: with moe.granularity = {slices}, "
            f"{slices} experts are one. Experts are counted singly: a token costs what {moe.top_k} whole copies cost with "
            f"moe.top_k={moe.top_k * slices}."
        )
    if moe.upcycling_share is not None and moe.upcycling == "copy":
        problems.append(
            f"moe.upcycling_share = {moe.upcycling_share:g} is read by moe.upcycling=noise and drop only. Choose one, or set it "
            "to null."
        )
    if moe.upcycling_share is not None and moe.upcycling == "drop" and moe.upcycling_share > 1:
        problems.append(f"moe.upcycling_share = {moe.upcycling_share:g} is no share of the channels. Give at most 1.")
    return problems


def _growth_problems(schedule: Curriculum, moe: schema.MoEConfig) -> list[str]:
    """Return why experts cannot become as many as events say, the fewest first: each is copied as often as the others."""
    wanted = [(event.to, name) for name, event in schedule.events.items() if event.to is not None]
    problems, before = [], moe.num_experts
    for number, name in sorted(wanted):
        if number % before or number == before:
            problems.append(
                f"schedule.events.{name}.to = {number} is no multiple of the {before} experts that there are before "
                f"(moe.num_experts = {moe.num_experts}). Choose one, such as {2 * before}."
            )
        before = number
    return problems


def _sharing_problems(groups: Mapping[str, Any], ranks: int) -> list[str]:
    """Return why ``ranks`` cannot share the model as the config says; how many a lone process is one of is not known yet."""
    model, moe, trainer = groups["model"], groups["moe"], groups["trainer"]
    experts = trainer.expert_parallel
    slices = f" / moe.granularity = {moe.granularity}" if moe.granularity > 1 else ""
    problems = []
    if type(trainer) in EXTRAS and (trainer.parallel != "ddp" or experts > 1):
        problems.append(
            f"trainer.parallel = {trainer.parallel}, trainer.expert_parallel = {experts}: they are for trainer=default. Choose "
            "it, or set trainer.parallel=ddp trainer.expert_parallel=1."
        )
    elif experts > 1 and trainer.parallel != "fsdp":
        problems.append(f"trainer.expert_parallel = {experts} needs trainer.parallel=fsdp. Set it, or 1.")
    if moe.num_experts % experts:
        problems.append(
            f"trainer.expert_parallel = {experts} does not divide moe.num_experts = {moe.num_experts}. Choose a divisor."
        )
    if ranks > 1 and ranks % experts:
        problems.append(
            f"trainer.expert_parallel = {experts} does not divide {ranks} ranks (launch.nodes x launch.tasks_per_node). "
            "Choose a divisor."
        )
    elif (
        ranks > 1
        and experts > 1
        and isinstance(model, schema.GPTConfig)
        and any(width % (ranks // experts) for width in (model.d_model, model.d_ff // moe.granularity))
    ):
        problems.append(
            f"trainer.expert_parallel = {experts} leaves {ranks // experts} ranks to cut each expert, and model.d_model = "
            f"{model.d_model} and model.d_ff = {model.d_ff}{slices} are not both multiples of that. Choose a larger one."
        )
    return problems


def _clip_problems(trainer: schema.TrainerConfig, model: schema.Group) -> list[str]:
    """Return why attention's logits could not be limited."""
    if trainer.qk_clip is None:
        return []
    if not isinstance(model, schema.GPTConfig):
        return [
            "trainer.qk_clip: it scales the attention of model=gpt and model=pretrained only. Set trainer.qk_clip=null."
        ]
    if model.qk_norm is not None:
        return [
            f"trainer.qk_clip: with model.qk_norm={model.qk_norm} logits do not depend on how large weights are. Set one of the "
            "two to null."
        ]
    return []


def _trainer_problems(trainer: schema.TrainerConfig, *, drill: bool) -> list[str]:
    """Return what the chosen trainer was asked for and cannot do."""
    problems = []
    if trainer.resume is not None and type(trainer) in EXTRAS:
        option, _ = EXTRAS[type(trainer)]
        problems.append(
            f"trainer.resume: trainer={option} cannot go on from a checkpoint. Choose trainer=default, which goes on from "
            "those of every trainer, or set trainer.resume=null."
        )
    if drill and type(trainer) in EXTRAS:
        option, _ = EXTRAS[type(trainer)]
        problems.append(
            f"launch.drill: a run of trainer={option} is continued by trainer=default, the same but for last digits, and a "
            "drill compares them. Choose trainer=default, or set launch.drill=false."
        )
    if trainer.on_nonfinite != "stop" and type(trainer) in EXTRAS:
        problems.append(f"trainer.on_nonfinite: {trainer.on_nonfinite} is for trainer=default only. Set it to stop.")
    if isinstance(trainer, HFConfig) and trainer.device.removeprefix("cuda:").strip("0").isdigit():
        number = trainer.device.removeprefix("cuda:")
        problems.append(
            f"trainer.device: trainer=hf takes the first device that it sees, not {trainer.device}. Set "
            f"trainer.device=cuda and the environment's CUDA_VISIBLE_DEVICES={number}."
        )
    return problems


def _vocabulary_problems(corpus: Corpus, vocab_size: int) -> list[str]:
    """Return whether the corpus has tokens that the model has not."""
    needed, place = corpus.vocab_size, corpus.tokenizer_file
    if needed <= vocab_size:
        return []
    return [
        f"model.vocab_size = {vocab_size} is less than the {needed} tokens of {place or 'a corpus of bytes'}. Set "
        f"model.vocab_size={needed}, or more."
    ]


def _bound_problems(corpus: Corpus, batch_size: int, seq_len: int) -> list[str]:
    """Say whether the corpus is cut off before it fills a batch: nothing of it need be read to know that."""
    most, needed = getattr(corpus, "max_tokens", None), batch_size * seq_len + 1
    if most is None or most >= needed:
        return []
    return [
        f"data.max_tokens = {most} is less than one batch: trainer.batch_size {batch_size} x model.seq_len {seq_len} + 1 = "
        f"{needed}. Raise it, or set one of them lower."
    ]


def _packing_problems(corpus: Corpus, values: Mapping[str, Any], model: schema.Group) -> list[str]:
    """Say why documents of a sequence could not be kept apart; of a function's model nobody knows yet."""
    if corpus.borders is None or isinstance(model, schema.GPTConfig):
        return []
    target = str(values["model"]["_target_"])
    name = target.rpartition(".")[2]
    if not isinstance(model, schema.TransformersConfig):
        forward = getattr(own.find(target, "model._target_"), "forward", None)
        if forward is None or "documents" in own.parameters(forward):
            return []
    else:
        name = "a model of transformers"
    return [takes_no_documents(name)]


def missing_libraries(groups: Mapping[str, Any]) -> list[str]:
    """Return what chosen options need and is not installed."""
    needed = [
        (name, *EXTRAS.get(type(groups[name]), ("", ())), f"choose {name}={default}")
        for name, default in (("trainer", "default"), ("logger", "wandb"), ("data", "text"), ("model", "gpt"))
        if name in groups
    ]
    if not isinstance(groups["data"], schema.Own) and getattr(groups["data"], "tokenizer", None):
        needed.append(("data.tokenizer", "tokenizers", ("tokenizers",), "set data.tokenizer=null"))
    return [problem for choice in needed if (problem := missing_library(*choice))]


def missing_library(key: str, option: str, libraries: Sequence[str], otherwise: str) -> str | None:
    """Return the message if one of ``libraries``, which the extra ``option`` of this package brings, is not installed."""
    from importlib.util import find_spec

    missing = [library for library in libraries if find_spec(library) is None]
    if not missing:
        return None
    return f"{key}: {' and '.join(missing)} cannot be found. Run: pip install 'apt-launch[{option}]', or {otherwise}."


def check_curriculum(values: Mapping[str, Any], groups: Mapping[str, Any], horizon: Horizon) -> Program:
    """Check that the curriculum and the learning rate's schedule can happen in this run.

    Raises:
        ConfigError: with every problem found.
    """
    from apt_model.schedule import Clock, Program
    from apt_model.schedule.targets import NOT_NEGATIVE

    problems: list[str] = []
    lr_schedule = groups["trainer"].lr_schedule
    if lr_schedule is not None:
        problems += lr_schedule.problems("trainer.lr_schedule", horizon, NOT_NEGATIVE)
        if lr_schedule.anchors():
            problems.append(
                "trainer.lr_schedule: it cannot wait for an event; write schedule.anneals with target: optimizer.lr, and "
                "trainer.lr_schedule=null."
            )
        if lr_schedule.target is not None:
            problems.append("trainer.lr_schedule.target: it always is the learning rate's factor. Set it to null.")
    profile = groups["trainer"].profile
    if profile is not None and profile.at + profile.steps > horizon.steps:
        problems.append(
            f"trainer.profile: updates {profile.at} to {profile.at + profile.steps - 1} are not all of this run, which has "
            f"{horizon.steps}, from 0 on. Set trainer.profile.at to {max(0, horizon.steps - profile.steps)} or less"
            f"{'' if profile.steps <= horizon.steps else f', and trainer.profile.steps to {horizon.steps} or less'}."
        )
    program = None
    try:
        program = Program(groups["schedule"], horizon, modules=catalogue.modules(values))
        program.check_targets(catalogue.targets(values), catalogue.parameters(values))
        writes_lr = any(groups["schedule"].target_of(name) == "optimizer.lr" for name in groups["schedule"].all_anneals)
        if writes_lr and lr_schedule is not None:
            problems.append(
                "schedule.anneals: optimizer.lr is written by trainer.lr_schedule already. Set trainer.lr_schedule=null."
            )
        if getattr(groups["model"], "sparse", False) and not program.at(Clock())["moe_enabled"]:
            problems.append(
                f"model.path: the model in {groups['model'].path} has experts, and the curriculum begins without. Set "
                "schedule.enable_moe_at_epoch=0."
            )
        known = catalogue.metrics(values)
        problems += [
            f"schedule.events: there is no metric {metric!r}. {nearest(metric, known)}"
            for metric in sorted(program.watched - known)
        ]
        problems += [
            f"schedule.events: a latch enables {subject.name} by {when.metric}, which exists only while {subject.name} is "
            "enabled. Choose another metric, or give the latch a deadline."
            for subject, when in program.latches.items()
            if when.metric.startswith(f"{subject.name}/") and when.metric != "voter/entropy" and when.deadline is None
        ]
    except ConfigError as error:
        problems += error.problems
    if problems or program is None:
        raise ConfigError(*problems)
    return program
