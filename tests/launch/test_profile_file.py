from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apt_launch.config.profile_file import with_profile_file
from apt_launch.config.run_config import RunConfig
from apt_model.errors import ConfigError

OLD = """
name: an older profile
plugins: [moe, align]
model:
  d_model: 64
  num_heads: 4
  num_layers: 3
  d_ff: 128
  vocab_size: 300
  max_seq_len: 32
  attention_name: tva_default
  ffn_name: gelu
  moe: {enabled: true, experts: 6, top_k: 3, capacity: 1.4, balance_loss: 0.02}
  bistate: {alpha: 0.4, beta: 0.1, tau_align: 0.2}
  voting: {threshold: 2.5, k: 4}
training:
  batch_size: 3
  max_epochs: 7
  learning_rate: 3e-5
  warmup_steps: 4
  weight_decay: 0.015
  gradient_clip: 0.5
  mixed_precision: false
  checkpoint_dir: somewhere
schedules:
  enable_moe_at_epoch: 2
  enable_align_at_epoch: 3
  enable_voter_at_epoch: 5
  route_temp:     {start: 1.5, end: 0.8, by: epoch}
  moe_capacity:   {start: 1.5, end: 1.1, by: epoch}
  align_weight:   {start: 0.0, end: 0.3, by: step, warmup: 20}
  vote_threshold: {start: 3.0, end: 2.0, by: epoch}
data:
  train_path: %s
  val_path: %s
  padding: max_length
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    rows = tmp_path / "it's, rows.jsonl"
    rows.write_text('{"text": "' + "words " * 400 + '"}\n')
    path = tmp_path / "old.yaml"
    path.write_text(OLD % (rows, rows))
    return path


def test_an_older_profile_loads_unchanged(old: Path, composed: Callable[..., RunConfig], capsys) -> None:
    config = composed(*with_profile_file([f"profile_file={old}"]))
    model, moe, trainer = config.model, config.moe, config.trainer
    assert (model.d_model, model.num_heads, model.num_layers, model.d_ff) == (64, 4, 3, 128)
    assert (model.vocab_size, model.seq_len, model.ffn, model.attention) == (300, 32, "gelu", "sdpa")
    assert (moe.num_experts, moe.top_k, moe.capacity_factor, moe.balance_loss_weight) == (6, 3, 1.4, 0.02)
    assert (config.align.alpha, config.align.beta, config.align.tau) == (0.4, 0.1, 0.2)
    assert (config.voter.threshold, config.voter.num_votes) == (2.5, 4)
    assert (trainer.batch_size, trainer.max_epochs, trainer.grad_clip, trainer.precision) == (3, 7, 0.5, "fp32")
    assert (config.optimizer.lr, config.optimizer.weight_decay, trainer.lr_schedule.warmup) == (3e-5, 0.015, 4)
    schedule = config.schedule
    assert config.program.first_step("voter") == 5 * 25
    assert schedule.align_weight.warmup == 20
    assert schedule.route_temp.end == 0.8
    assert config.horizon.updates_per_epoch == 2400 // 32 // 3
    assert capsys.readouterr().err == (
        "profile_file: not used: name, plugins, model.attention_name, model.moe.enabled, training.checkpoint_dir, "
        "data.padding\n"
    )


def test_the_command_line_wins_over_the_file(old: Path, composed: Callable[..., RunConfig]) -> None:
    arguments = [
        f"profile_file={old}",
        "schedule.route_temp.end=0.6",
        "model.d_ff=64",
        "schedule.enable_moe_at_epoch=1",
    ]
    config = composed(*with_profile_file(arguments))
    assert (config.schedule.route_temp.end, config.schedule.route_temp.start, config.model.d_ff) == (0.6, 1.5, 64)
    assert config.program.first_step("moe") == 25


def test_a_group_chosen_on_the_command_line_stays_chosen(
    old: Path, composed: Callable[..., RunConfig], text_file: Path, capsys
) -> None:
    arguments = [f"profile_file={old}", "data=text", f"data.path={text_file}", "schedule=none"]
    config = composed(*with_profile_file(arguments))
    assert config.values["data"]["path"] == str(text_file)
    assert config.schedule.all_anneals == {}
    told = capsys.readouterr().err
    assert "data.train_path" in told
    assert "schedules.route_temp" in told


def test_a_mistake_in_the_file_is_named_like_one_on_the_command_line(
    old: Path, composed: Callable[..., RunConfig]
) -> None:
    old.write_text(old.read_text().replace("route_temp:", "rout_temp:"))
    with pytest.raises(ConfigError, match=r"schedule\.rout_temp: unknown key\. Did you mean 'route_temp'"):
        composed(*with_profile_file([f"profile_file={old}"]))


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "cannot be read as YAML"), ("- 1", "no mapping of sections")]
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        with_profile_file([f"profile_file={path}"])
    with pytest.raises(ConfigError, match="profile_file: there is no file 'nowhere'"):
        with_profile_file(["profile_file=nowhere"])


@pytest.mark.parametrize(
    ("content", "unused"),
    [
        ("training: null", "training"),
        ("training: 3", "training"),
        ("training: [1, 2]", "training"),
        ("model: {attention_name: [sdpa]}", "model.attention_name"),
        ('training: {mixed_precision: "no"}', "training.mixed_precision"),
        ("model: {d_model: null}", "model.d_model"),
    ],
)
def test_odd_values_of_a_file_are_reported_as_not_used(tmp_path: Path, content: str, unused: str, capsys) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(content)
    assert with_profile_file([f"+profile_file={path}"]) == [f"+profile_file={path}"]
    assert capsys.readouterr().err == f"profile_file: not used: {unused}\n"
