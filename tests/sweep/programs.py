"""Programs as people write them with Hydra, small ones: none of them knows that it is swept."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

from tests.forks import REPOSITORY, environment

SEES = '''
"""Writes down all that a job of Hydra can see."""
import enum, json, logging, os, pathlib, sys
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional
import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import MISSING, DictConfig, OmegaConf

log = logging.getLogger(__name__)

class Colour(enum.Enum):
    RED = 1
    BLUE = 2

@dataclass
class Db:
    driver: str = MISSING
    port: int = 1

@dataclass
class Postgres(Db):
    driver: str = "postgres"
    user: str = "me"

@dataclass(frozen=True)
class Fixed:
    word: str = "a.b"

@dataclass
class Config:
    db: Db = MISSING
    lr: float = 0.1
    seed: int = 0
    colour: Colour = Colour.RED
    place: pathlib.Path = pathlib.Path("a/b")
    sizes: List[int] = field(default_factory=lambda: [1, 2])
    table: Dict[int, str] = field(default_factory=lambda: {10: "ten"})
    more: Dict[str, Db] = field(default_factory=lambda: {"first": Postgres(port=7)})
    fixed: Fixed = field(default_factory=Fixed)
    maybe: Optional[int] = None
    anything: Any = None

store = ConfigStore.instance()
store.store(name="schema", node=Config)
store.store(group="db", name="postgres", node=Postgres)
OmegaConf.register_new_resolver("times", lambda a, b: a * b)
drawn = iter(range(10**6))
OmegaConf.register_new_resolver("draw", lambda: next(drawn))

class Told(Callback):
    def __init__(self, word): self.word = word
    def on_job_start(self, config, **more): self.say("start", config)
    def on_job_end(self, config, job_return, **more): self.say(f"end {job_return.status.name}", config)
    def say(self, what, config):
        with open(os.path.join(config.hydra.runtime.output_dir, "callbacks.txt"), "a") as file:
            file.write(f"{self.word} {what} {config.hydra.job.num}\\n")

def shape(node):
    if OmegaConf.is_dict(node):
        kind = OmegaConf.get_type(node).__name__
        return [kind, [[repr(key), shape(node[key]) if not OmegaConf.is_missing(node, key) else "???"] for key in node]]
    return [shape(one) for one in node] if OmegaConf.is_list(node) else repr(node)

@hydra.main(version_base=VERSION, config_path="conf", config_name="config")
def main(cfg: DictConfig):
    now = HydraConfig.get()
    log.info("a line of the log with lr %s", cfg.lr)
    here = pathlib.Path(now.runtime.output_dir)
    seen = {
        "cfg": shape(cfg), "struct": OmegaConf.is_struct(cfg), "object": repr(OmegaConf.to_object(cfg.rig.db)),
        "num": now.job.num, "id": now.job.id, "name": now.job.name, "task": list(now.overrides.task),
        "choices": {k: v for k, v in now.runtime.choices.items() if not k.startswith("hydra/")},
        "output": here.name, "cwd_of_hydra": now.runtime.cwd, "config_name": now.job.config_name,
        "cwd": os.path.relpath(os.getcwd(), here.parent), "env": os.environ.get("MINE"), "first": sys.path[0],
        "main": [__name__, __file__], "classes": [Config.__module__, type(cfg.rig.colour).__module__],
        "is_colour": isinstance(cfg.rig.colour, Colour), "mode": str(now.mode),
        "files": sorted(str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()),
    }
    (here / "seen.json").write_text(json.dumps(seen, indent=1))
    return cfg.lr * (1 + cfg.rig.seed)

if __name__ == "__main__":
    main()
'''

SEES_CONFIG = """
defaults:
  - schema@rig
  - db@rig.db: mysql
  - _self_
lr: 0.5
product: ${times:${lr},10}
where: ${hydra:runtime.output_dir}
number: ${hydra:job.num}
text: '\\${not.resolved} \\\\'
layers: {10: a, 'b.c': d, true: e}
copy: ${rig.db}
login: {password: c4n4ry-0123, url: 'https://me:${login.password}@host', pin: '${login.password}'}
unset: ???
hydra:
  job: {chdir: true, env_set: {MINE: 'x-${hydra.job.num}'}, config: {override_dirname: {exclude_keys: [seed]}}}
  output_subdir: .mine
  sweep: {subdir: 'run-${hydra.job.num}'}
  callbacks: {told: {_target_: __main__.Told, word: 'lr ${lr}'}}
"""

PACKAGE = '''
"""Started by ``python -m lab.train``; imports its neighbours by relative names."""
import hydra
from .model import loss

@hydra.main(version_base=VERSION, config_path="conf", config_name="config")
def main(cfg):
    print("the loss of", cfg.lr)
    return loss(cfg)

if __name__ == "__main__":
    main()
'''

MODEL = """
def loss(cfg):
    if cfg.lr > 1:
        raise ValueError(f"lr={cfg.lr} is too large")
    return {"loss": cfg.lr, "accuracy": 1 - cfg.lr}
"""

BARE = '''
"""No folder of configs, and a function that hydra.main gets from a wrapper, as hydra-zen makes it; numpy only."""
from functools import wraps
import hydra
import numpy as np
from hydra.core.config_store import ConfigStore

def task(x: int, scale: float):
    return np.float32(x * scale)

def wrapped(function):
    @wraps(function)
    def called(cfg):
        return function(**cfg)
    return called

if __name__ == "__main__":
    ConfigStore.instance().store(name="bare", node={"x": 1, "scale": 0.5})
    hydra.main(config_path=None, config_name="bare", version_base=VERSION)(wrapped(task))()
'''

SQUARE = '''
"""What an optimizer is given."""
import hydra

@hydra.main(version_base=VERSION, config_path=None)
def main(cfg):
    return (cfg.x - 1) ** 2 + 0.5

if __name__ == "__main__":
    main()
'''

LOOPS = '''
"""Reports, saves and stops when it is asked, and runs without a sweep as well."""
import json, time
import hydra
from apt_launch.sweep import job

@hydra.main(version_base=VERSION, config_path=None)
def main(cfg):
    saved = job.checkpoints / "last.json"
    first = json.loads(saved.read_text())["step"] if saved.exists() else 0
    print("begins at", first, flush=True)
    step = first
    while step < 5 or (cfg.get("holds") and first == 0):
        job.report(step=step, total=5, **{"val/loss": cfg.get("scale", 1) / (step + 1)})
        if cfg.get("asks", True) and job.stop_requested():
            saved.write_text(json.dumps({"step": 3}))
            job.requeue()
        if step > 4:
            time.sleep(0.01)
        step += 1
    return 1 / step

if __name__ == "__main__":
    main()
'''

FOLDERS = '''
"""Writes where Hydra says, in a folder whose name needs a resolver of its own, as Lightning writes its metrics."""
import pathlib
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from apt_launch.sweep import job

OmegaConf.register_new_resolver("tidy", lambda text: text.replace("=", "-"))

@hydra.main(version_base=VERSION, config_path=None)
def main(cfg):
    output = pathlib.Path(HydraConfig.get().runtime.output_dir)
    (output / "metrics.csv").write_text(f"step,val\\n3,{cfg.x}\\n")
    print(f"{output}|{job.folder}|{HydraConfig.get().sweep.dir}")
    return cfg.x

if __name__ == "__main__":
    main()
'''


def of_users(**more: str) -> dict[str, str]:
    """The environment of a user who has installed the package."""
    places = [
        str(REPOSITORY),
        str(REPOSITORY / "apt_launch/sweep/namespace"),
        *os.environ.get("PYTHONPATH", "").split(":"),
    ]
    return environment(PYTHONPATH=":".join(filter(None, places)), PYTHONWARNINGS="default", **more)


def before_1_4() -> bool:
    """Whether Hydra is of a version that asks for ``version_base``."""
    return version("hydra-core").startswith("1.3")


def write(folder: Path, files: dict[str, str]) -> None:
    """Write a program's files; ``version_base=VERSION`` becomes what its author would have written for this Hydra."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_as_written(text))


def _as_written(text: str) -> str:
    if before_1_4():
        return text.replace("version_base=VERSION", 'version_base="1.3"')
    return text.replace(", version_base=VERSION", "").replace("version_base=VERSION, ", "")
