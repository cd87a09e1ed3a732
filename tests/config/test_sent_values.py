"""Values that leave the config: for job scripts, and for programs that are asked for something."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from apt_launch.runs.provenance import provenance
from apt_launch.sweep.backends.registry import backend
from apt_model.errors import ConfigError

VALUES: dict[str, Any] = {
    **dict.fromkeys(("partition", "account", "qos", "constraint", "exclude", "gres", "max_parallel", "python")),
    **{"signal_delay_s": 90, "setup": [], "srun_args": [], "additional_parameters": {}, "retry_minutes": 10},
}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        *(
            (key, "a\n#SBATCH --wrap=x", key)
            for key in ("partition", "account", "qos", "constraint", "exclude", "gres")
        ),
        ("partition", "a b", "partition"),
        ("partition", "-x", "partition"),
        ("account", "a;id", "account"),
        ("account", "a\u2028b", "account"),
        ("python", "python\ntouch x", "python"),
        ("setup", ["module load a", "b\r\ntouch x"], "setup.1"),
        ("srun_args", ["--x=1\ntouch x"], "srun_args.0"),
        ("additional_parameters", {"reservation": "a\ntouch x"}, "additional_parameters.reservation"),
        ("additional_parameters", {"x=1\ntouch x": 1}, "additional_parameters.x=1\ntouch x"),
        ("additional_parameters", {"output": "/x"}, "additional_parameters.output"),
        ("additional_parameters", {"mail_user": ["a"]}, "additional_parameters.mail_user"),
    ],
)
def test_what_would_be_another_line_of_a_job_script_is_refused(key: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        backend("slurm", VALUES | {key: value})
    assert refused.value.problems[0].startswith(f"hydra.launcher.{named}: ")


def test_what_slurm_knows_is_taken() -> None:
    known = {
        "partition": "gpu,gpu_long",
        "account": "proj-1.x@site",
        "constraint": "[rack1|rack2]&(a*2)",
        "exclude": "n[01-03]",
    }
    more = {"mail_user": "a@b.c", "reservation": "night", "comment": "two words", "requeue": False, "mem_per_gpu": 4}
    given = VALUES | known | {"gres": "gpu:a100:2(S:0)", "setup": ['export A="$B"\t# x'], "additional_parameters": more}
    assert backend("slurm", given).name == "slurm"


def test_git_runs_no_program_that_a_repository_names(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init", "-q")
    git("config", "user.email", "a@example.org")
    git("config", "user.name", "a")
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / ".gitattributes").write_text("*.txt filter=x.y diff=x\n")
    git("add", ".")
    git("commit", "-qm", "a")
    (tmp_path / "a.txt").write_text("a\nb\n")
    names = (
        "filter.x.y.clean",
        "filter.x.y.process",
        "diff.x.command",
        "diff.x.textconv",
        "core.fsmonitor",
        "diff.external",
    )
    for name in names:
        git("config", name, f"touch '{tmp_path}/ran-{name}'; cat")
    git("config", "filter.x.y.required", "true")
    found = provenance(tmp_path)["git"]
    assert found["dirty"] is True
    assert found["diff"].endswith("@@ -1 +1,2 @@\n a\n+b\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", ".gitattributes", "a.txt"]
