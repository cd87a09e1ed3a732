from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.utils import get_object

from apt_launch.config import schema
from apt_launch.config.explain import explained
from apt_launch.config.instantiate import build
from apt_launch.config.load import CONF, parse
from apt_launch.config.run_config import RunConfig, is_neutral
from apt_model.data.tokenizer import train_tokenizer
from apt_model.errors import ConfigError
from apt_model.gpt import GPT
from apt_model.training.options import CONCERNS

Composed = Callable[..., RunConfig]

OPTIONS = [
    f"{path.parent.relative_to(CONF)}={path.stem}"
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name not in ("profile", "data", "sweeps") and path.stem not in ("own", "transformers", "pretrained")
]
"""Those that need no more words; tests/config/test_own.py has classes of one's own, tests/integrations the other."""


def test_experts_of_a_pretrained_model_need_one(composed: Composed) -> None:
    with pytest.raises(
        ConfigError, match=r"^moe=pretrained: only model=pretrained brings experts. Choose moe=experts.$"
    ):
        composed("moe=pretrained")


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_is_right(composed: Composed, option: str) -> None:
    group, name = option.split("=")
    more = ["schedule=gpt5_moe"] if group != "schedule" else []
    assert composed(option, *more).values[group] is not None, name


@pytest.mark.parametrize(
    ("name", "expected"),  # the factor at updates 5 and 10, and at the last one; 256 of them, the warmup is 13
    [
        ("cosine", [5 / 13, 10 / 13, 0.1]),
        ("linear", [5 / 13, 10 / 13, 0.0]),
        ("wsd", [5 / 13, 10 / 13, 0.0]),
        ("inverse_sqrt", [5 / 13, 10 / 13, (13 / 255) ** 0.5]),
    ],
)
def test_learning_rates_have_shapes_by_name(composed: Composed, name: str, expected: list[float]) -> None:
    config = composed(f"trainer/lr={name}")
    factors = [config.course.lr(config.horizon.clock_at(step)) / config.optimizer.lr for step in (5, 10, 255)]
    assert factors == pytest.approx(expected)
    tokens = composed(f"trainer/lr={name}", "trainer.lr_schedule.warmup=41ktok")  # of 16 x 256 = 4096: 11 updates
    assert tokens.course.lr(config.horizon.clock_at(5)) == pytest.approx(5 / 11 * config.optimizer.lr)
    assert (config.identity == composed().identity) is (name == "cosine")


def test_a_shape_by_name_wins_over_a_profile(composed: Composed) -> None:
    config = composed("profile=tiny_debug", "trainer/lr=wsd", "trainer.lr_schedule.cooldown=1ep")
    assert (config.trainer.lr_schedule.end, config.trainer.lr_schedule.cooldown) == (1.0, "1ep")


def test_every_data_option_composes_and_is_right(composed: Composed, text_file: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "' + "some words " * 2000 + '"}\n')
    assert composed("data=stdlib").horizon.steps == 256
    assert composed("data=text", f"data.path={text_file}", "trainer.batch_size=1").horizon.updates_per_epoch > 1
    jsonl = composed("data=jsonl", f"data.train_path={rows}", f"data.val_path={rows}")
    assert jsonl.horizon.updates_per_epoch == (11 * 2000 + 1 - 1) // 256 // 16
    files = ("data.path=json", f"data.data_files={{train: {rows}, validation: {rows}}}", f"data.cache={tmp_path}")
    datasets = composed("data=hf", *files)
    assert datasets.horizon == jsonl.horizon
    made = next(path.parent for path in tmp_path.glob("*/manifest.json"))
    assert composed("data=shards", f"data.path={made}").horizon == jsonl.horizon


def test_a_vocabulary_that_the_model_has_no_room_for_is_reported_before_tokens_are_made(
    composed: Composed, text_file: Path, tmp_path: Path
) -> None:
    bpe = train_tokenizer([text_file.read_text()], 300)
    (tmp_path / "tokenizer.json").write_text(bpe.content)
    asked = ("data=text", f"data.path={text_file}", f"data.tokenizer={tmp_path}", f"data.cache={tmp_path}/cache")
    with pytest.raises(
        ConfigError, match=r"^model\.vocab_size = 256 is less than the 300 .*model\.vocab_size=300, or more"
    ):
        composed(*asked)
    assert not (tmp_path / "cache").exists()
    composed(*asked, "model.vocab_size=300", "model.seq_len=16", "trainer.batch_size=2")
    made = next((tmp_path / "cache").glob("*/manifest.json")).parent
    with pytest.raises(ConfigError, match=r"^model\.vocab_size = 299 is less than the 300 tokens of "):
        composed("data=shards", f"data.path={made}", "model.vocab_size=299")


def test_a_config_of_before_there_were_tokenizers_is_still_right(composed: Composed) -> None:
    values = composed("data=stdlib").values
    data = {key: value for key, value in values["data"].items() if key not in ("tokenizer", "cache")}
    assert parse({**values, "data": data}).horizon == parse(values).horizon


def test_the_full_profile_has_its_literal_numbers(composed: Composed, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "' + "x" * 2048 * 32 * 101 + '"}\n')
    config = composed("profile=gpt5_moe_reasoning", f"data.train_path={rows}", f"data.val_path={rows}")
    model, moe, trainer = config.model, config.moe, config.trainer
    assert (model.d_model, model.num_heads, model.num_layers, model.d_ff) == (768, 12, 24, 3072)
    assert (model.vocab_size, model.seq_len) == (50257, 2048)
    assert (moe.num_experts, moe.top_k, moe.capacity_factor, moe.balance_loss_weight) == (64, 2, 1.25, 0.01)
    assert (config.align.alpha, config.align.beta, config.align.tau) == (0.35, 0.20, 0.15)
    assert (config.voter.threshold, config.voter.num_votes) == (2.2, 3)
    assert (trainer.batch_size, trainer.max_epochs, trainer.lr_schedule.warmup, trainer.grad_clip) == (
        32,
        50,
        1500,
        1.0,
    )
    assert (config.optimizer.lr, config.optimizer.weight_decay, trainer.precision) == (3e-5, 0.015, "auto")
    assert config.schedule.align_weight.warmup == 5000
    assert config.horizon.steps == 50 * 101


def test_the_tiny_profile_has_its_literal_numbers_and_no_curriculum(composed: Composed) -> None:
    config = composed("profile=tiny_debug")
    model = config.model
    assert (model.d_model, model.num_heads, model.num_layers, model.d_ff) == (64, 4, 2, 256)
    assert (model.vocab_size, model.seq_len, config.trainer.batch_size, config.trainer.max_epochs) == (256, 128, 2, 3)
    assert config.schedule.all_anneals == {}
    assert config.schedule.all_events() == {}


def test_the_gpt5_moe_curriculum_is_the_one_of_the_profile(composed: Composed) -> None:
    config = composed("schedule=gpt5_moe")
    assert {module: (config.program.first_step(module) or 0) // 32 for module in ("moe", "align", "voter")} == {
        "moe": 2,
        "align": 3,
        "voter": 5,
    }
    ends = {name: (spec.start, spec.end, spec.by, spec.warmup) for name, spec in config.schedule.all_anneals.items()}
    assert ends == {
        "route_temp": (1.5, 0.8, "epoch", 0),
        "moe_capacity": (1.5, 1.1, "epoch", 0),
        "align_weight": (0.0, 0.3, "step", "10%"),
        "vote_threshold": (3.0, 2.0, "epoch", 0),
    }


@pytest.mark.parametrize(
    "target", [(target, config) for targets in schema.GROUPS.values() for target, config in targets.items() if target]
)
def test_keys_in_yaml_equal_parameters_of_the_class(target: tuple[str, type[schema.Group]]) -> None:
    name, config = target
    keys = {field.alias or key for key, field in config.model_fields.items()} - {"_target_"}
    parameters = inspect.signature(get_object(name)).parameters
    if name == "apt_model.schedule.ScheduleRunner":
        assert set(parameters) == {"horizon", "modules", "broadcast", "program", "curriculum"}
        return
    taken = set(parameters)
    if name == "apt_model.layouts.pretrained.PretrainedGPT":  # hands what it does not know to its base
        taken |= set(inspect.signature(GPT).parameters)
    if name in schema.GROUPS["trainer"]:
        keys -= {key for key in keys if schema.role_of(f"trainer.{key}") is schema.Role.PROCESS}
        keys -= {"init_from"}  # a method: who builds the trainer calls it
        assert CONCERNS.keys() <= taken
        taken |= {option.name for kind in CONCERNS.values() for option in fields(kind)}
    assert keys <= taken, f"{name} does not take {keys - taken}"
    given = {"model": {"moe", "align", "voter"}, "optimizer": set()}
    forgotten = {
        parameter.name
        for parameter in parameters.values()
        if parameter.default is inspect.Parameter.empty and parameter.kind is inspect.Parameter.KEYWORD_ONLY
    } - keys
    injected = {"moe", "model", "optimizer", "schedule", "corpus", "d_model", "folder"}
    injected |= {"run_id", "config", "updates_per_epoch", *CONCERNS}
    assert forgotten <= injected | given["model"], f"{name} needs {forgotten}, which no key gives"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+schedule.rout_temp.end=1"], r"^schedule\.rout_temp: unknown key\. Did you mean 'route_temp'"),
        (["+trainer.max_epoch=1"], r"^trainer\.max_epoch: unknown key\. Did you mean 'max_epochs'"),
        (["+sead=1"], r"^sead: unknown key\. Did you mean 'seed'"),
        (["schedule.route_temp.end=hot"], r"^schedule\.route_temp\.end: 'hot' is not valid"),
        (["trainer.max_epochs=1.5"], r"^trainer\.max_epochs: 1\.5 is not valid"),
        (["trainer.batch_size='2'"], r"^trainer\.batch_size: '2' is not valid"),
        (["moe.shared_expert=1"], r"^moe\.shared_expert: 1 is not valid"),
        (["optimizer.lr=-1"], r"^optimizer\.lr: -1 is not valid: .*greater than 0"),
        (["optimizer.lr=nan"], r"^optimizer\.lr: nan is not valid"),
        (["moe.router=sofmax"], r"^moe\.router: 'sofmax' is not one of the choices\. Did you mean 'softmax'"),
        (["model.attention=flash"], r"^model\.attention: 'flash' is not one of the choices\. Valid names: eager, sdpa"),
        (["model.ffn=swigl"], r"^model\.ffn: .*'swiglu'"),
        (["trainer.device=gpu"], r"^trainer\.device: 'gpu' is not valid"),
        (["model.d_model=130"], r"^model\.d_model = 130 does not give 4 heads .*multiple of 8"),
        (
            ["trainer.qk_clip=100", "model.qk_norm=head"],
            r"^trainer\.qk_clip: with model\.qk_norm=head .* Set one of the two to",
        ),
        (
            ["trainer.profile={at: 254, steps: 3}"],
            r"^trainer\.profile: updates 254 to 256 are not all of this run, which has 256, from 0 on\. Set .* to 253 or less\.",
        ),
        (["moe.top_k=9"], r"^moe\.top_k = 9 is more than moe\.num_experts = 8"),
        (["moe.granularity=5"], r"^.*moe\.granularity = 5 does not divide model\.d_ff = 384"),
        (["moe.granularity=2", "moe.top_k=3"], r"^moe\.top_k = 3 does not reach whole copies .*moe\.top_k=6"),
        (["moe.granularity=8", "moe.top_k=8"], r"^moe\.num_experts = 8 is not two .*moe\.num_experts=64"),
        (["moe.upcycling_share=0.1"], r"^moe\.upcycling_share = 0\.1 is read by moe\.upcycling=noise and drop only"),
        (["moe.upcycling=drop", "moe.upcycling_share=2"], r"^moe\.upcycling_share = 2 is no share"),
        (["moe.jitter=1"], r"^moe\.jitter: 1 is not valid"),
        (["moe.capacity_factor=null"], r"^moe\.capacity_factor is null .*schedule\.moe_capacity=null"),
        (["data.tokenizer=nowhere"], r"^data\.tokenizer: there is no file 'nowhere' .*--train-tokenizer"),
        (["data=hf", "data.path=x", "data.streaming=true"], r"^data\.streaming: .*Set data\.max_tokens"),
        (["data=hf", "data.path=x", "data.data_files=[1]"], r"^data\.data_files"),
        (
            ["data=hf", "data.path=x", "data.streaming=true", "data.max_tokens=2000"],
            r"^data\.max_tokens = 2000 is less than one batch: trainer\.batch_size 16 x model\.seq_len 256 \+ 1 = 4097\.",
        ),
        (["data=shards", "data.path=nowhere"], r"^data\.path: 'nowhere' holds no shards: .*apt_launch\.tokenize"),
        (["model.vocab_size=100"], r"^model\.vocab_size = 100 is less than the 256 tokens"),
        (["schedule.route_temp.end=0"], r"^schedule\.route_temp\.end = 0 is outside its domain"),
        (["schedule.enable_moe_at_step=3"], r"^schedule\.enable_moe_at_epoch and .* are both set"),
        (["trainer.max_epochs=5"], r"^schedule\.enable_voter_at_epoch = 5 would never happen: the run has 5 epochs"),
        (["schedule.align_weight.warmup=256"], r"^schedule\.align_weight\.warmup is 256 .*only 256 steps"),
        (["trainer.lr_schedule.warmup=256"], r"^trainer\.lr_schedule\.warmup is 256 .*only 256 steps"),
        (
            ["trainer.lr_schedule.typ=x"],
            r"^trainer\.lr_schedule\.typ: unknown key\. Did you mean 'trainer\.lr_schedule\.type'",
        ),
        (["+trainer.lr_schedule.from=moe.enabled"], r"^trainer\.lr_schedule: it cannot wait for an event"),
        (
            ["trainer.lr_schedule.cooldown=3"],
            r"^trainer\.lr_schedule\.cooldown: only trainer/lr=cosine, .*trainer/lr=wsd list this key\..* \+\+trainer",
        ),
        (["data.pack=documents"], r"^data\.pack: 'documents' is not one of the choices\. Did you mean 'document'"),
        (
            ["data.pack=document", "model=transformers", "model.config={model_type: llama}", "model.vocab_size=256"],
            r"data\.pack: a model of transformers takes no documents, so that those of one sequence would see each other",
        ),
        (["trainer/lr=wds"], r"^trainer/lr: there is no option 'wds'\. Did you mean 'wsd'"),
        (["trainer/l=wsd"], r"^trainer/l: unknown key\. Did you mean 'trainer/lr'"),
        (["trainer/lr=wsd", "trainer.lr_schedule.cooldwn=1"], r"cooldwn: unknown key\. Did you mean '.*cooldown'"),
        (
            [
                "schedule.enable_moe_at_epoch=null",
                "+schedule.events.x={enable: moe, when: {metric: moe/max_load, above: 2}}",
            ],
            r"a latch enables moe by moe/max_load, which exists only while moe is enabled",
        ),
        (["seed=99999999999999999999999"], r"seed: 99999999999999999999999 is not valid"),
        (["schedule.route_tmp.end=0.6"], r"Did you mean 'schedule\.route_temp\.end'"),
        (["data=text"], r"^data\.path: has no value yet\. Set it: data\.path="),
        (["data=text", "data.path=nowhere"], r"^data\.path: there is no file or folder 'nowhere'"),
        (
            ["trainer.batch_size=100000"],
            r"^data: the train split has .* less than one batch: trainer\.batch_size 100000",
        ),
        (["model._target_=os.system"], r"^model\._target_: 'os\.system' may not be built here"),
        (["+model.x._target_=os.system"], r"^model\.x: unknown key"),
        (["+moe.num_experts._target_=os.system"], r"num_experts"),
        (["trainer=lightning", "trainer.resume=auto"], r"^trainer\.resume: trainer=lightning cannot .*trainer=default"),
        (["trainer=hf", "trainer.resume=x"], r"^trainer\.resume: trainer=hf cannot .*trainer\.resume=null"),
        (["trainer=hf", "launch.drill=true"], r"^launch\.drill: a run of trainer=hf .*set launch\.drill=false"),
        (["trainer=hf", "trainer.device=cuda:1"], r"^trainer\.device: trainer=hf .*CUDA_VISIBLE_DEVICES=1"),
        (["trainer=hf", "trainer.parallel=fsdp"], r"^trainer\.parallel = fsdp, .*they are for trainer=default"),
        (
            ["trainer=lightning", "trainer.expert_parallel=2"],
            r"^trainer\.parallel = ddp, .*they are for trainer=default",
        ),
        (["trainer.expert_parallel=2"], r"^trainer\.expert_parallel = 2 needs trainer\.parallel=fsdp"),
        (
            ["trainer.parallel=fsdp", "trainer.expert_parallel=3"],
            r"^trainer\.expert_parallel = 3 does not divide moe\.num_experts = 8",
        ),
        (
            ["trainer.parallel=fsdp", "trainer.expert_parallel=4", "launch.nodes=2"],
            r"^trainer\.expert_parallel = 4 does not divide 2 ranks \(launch\.nodes x launch\.tasks_per_node\)",
        ),
        (
            ["trainer.parallel=fsdp", "trainer.expert_parallel=2", "launch.nodes=10", "trainer.batch_size=10"],
            r"leaves 5 ranks to cut each expert, and model\.d_model = 128 and model\.d_ff = 384 are not both multiples",
        ),
        (["trainer.parallel=fsdb"], r"^trainer\.parallel: 'fsdb' is not one of the choices\. Did you mean 'fsdp'"),
        (["model=null"], "model=null: the group takes the name of an option"),
    ],
)
def test_what_is_wrong_is_named_with_its_full_key_and_a_remedy(
    composed: Composed, overrides: list[str], message: str
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra's own errors are explained, too
        composed(*overrides)
    problem = explained(caught.value)
    assert isinstance(problem, ConfigError)
    assert re.search(message, str(problem), flags=re.DOTALL), str(problem)


def test_a_key_of_another_option_is_reported_as_such(composed: Composed) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        composed("data.path=x")
    assert (
        str(explained(caught.value))
        == "data.path: the chosen option of 'data' has no such key, but data=hf or data=shards or data=text has."
    )


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.open",
        "pathlib.Path.unlink",
        "torch.load",
        "torch.hub.load",
        "pytest.main",
        "apt_model.gpt.torch.load",
        "apt_launch.config.instantiate.instantiate",
        "apt_model.training.checkpoint.shutil.rmtree",
        "submitit.core.utils.DelayedSubmission.load",
    ],
)
def test_nothing_outside_the_allow_list_is_built_also_when_nested(target: str, tmp_path: Path) -> None:
    for values in (
        {"_target_": target},
        {"_target_": "apt_model.data.StdlibCorpus", "val_fraction": {"_target_": target, "_partial_": True}},
        {"_target_": "apt_model.data.StdlibCorpus", "seed": [{"_target_": target}]},
    ):
        with pytest.raises(ConfigError, match=f"{target!r} may not be built here"):
            build(values)


ROLES = {
    "model": "fixed",
    "model.path": "neutral",
    "model.revision": "neutral",
    "data": "fixed",
    "data.cache": "neutral",
    "data.verify": "neutral",
    "moe.num_experts": "fixed",
    "moe.granularity": "fixed",
    "moe.router": "fixed",
    "moe.shared_expert": "fixed",
    "align.rank": "fixed",
    "schedule.on_horizon_change": "neutral",
    "optimizer._target_": "fixed",
    "trainer.batch_size": "fixed",
    "trainer.accumulate": "fixed",
    "trainer.parallel": "neutral",
    "trainer.profile": "process",
    "trainer.expert_parallel": "neutral",
    "trainer.activation_checkpointing": "neutral",
    "trainer.init_from": "fixed",
    "trainer.resume": "process",
    "trainer.log_every": "neutral",
    "trainer.checkpoint_every_epochs": "neutral",
    "trainer.checkpoint_every_minutes": "neutral",
    "trainer.keep_last": "process",
    "trainer.keep_best": "process",
    "trainer.keep_every": "process",
    "trainer.stall_minutes": "process",
    "trainer.keep_freed_memory": "process",
    "trainer.onednn_products": "process",
    "logger": "neutral",
    "seed": "fixed",
    "profile_file": "neutral",
    "launch": "neutral",
}


def test_each_key_has_the_role_that_it_should_have() -> None:
    assert {key: role.name.lower() for key, role in schema.roles().items()} == ROLES
    for key, role in (
        ("model.d_model", "fixed"),
        ("data.cache", "neutral"),
        ("data.data_files.train", "fixed"),
        ("launch.drill", "neutral"),
        ("logger._target_", "neutral"),
    ):
        assert schema.role_of(key) is schema.Role[role.upper()], key
    assert not [key for key in ("optimizer.lr", "schedule.route_temp.end", "moe", "unknown") if schema.role_of(key)]
    assert [is_neutral(key) for key in ("trainer.resume", "data.cache", "launch.hours", "seed", "optimizer.lr")] == (
        [True, True, True, False, False]
    )


def test_identity_is_that_of_the_result(composed: Composed) -> None:
    base = composed().identity
    assert len(base) == 64
    for neutral in (
        "data.cache=elsewhere",
        "logger.mode=disabled",
        "trainer.log_every=1",
        "trainer.keep_last=9",
        "logger=none",
    ):
        assert composed(neutral).identity == base
    for real in ("seed=1", "schedule.route_temp.end=0.6", "trainer.precision=fp32", "model.ffn=gelu"):
        assert composed(real).identity != base
    assert composed("schedule.route_temp.end=0.60").identity == composed("schedule.route_temp.end=0.6").identity


def test_keys_that_came_later_leave_the_identities_of_earlier_runs_as_they_were(
    composed: Callable[..., RunConfig],
) -> None:
    earlier = ("data=stdlib", "align.trains=all", "voter.draws=independent")  # what was meant by nothing
    assert composed(*earlier).identity[:8] == "c8e6f60d"  # as on 2026-11-28, before they came
    assert composed(*earlier, "schedule=none").identity[:8] == "9d0ec8c0"
    for key in ("model.qkv_bias=true", "data.pack=document", "align.trains=projection", "voter.draws=opposite"):
        assert composed(*earlier, key).identity[:8] != "c8e6f60d"
