"""The curriculum: when modules are enabled and how values anneal. Pure: it knows no tensors and no trainer.

from apt_model.schedule import Clock, Horizon, ScheduleRunner

schedule = ScheduleRunner(horizon=Horizon(epochs=8, updates_per_epoch=50),
                          enable_moe_at_epoch=2, route_temp={"start": 1.5, "end": 0.8, "by": "epoch"})
schedule.bind(values={"router.temperature": model.set_temperature}, switches={"moe": model.enable_moe})
schedule.apply(clock)  # before each update
"""

from apt_model.schedule.anneal import Anneal
from apt_model.schedule.clock import Clock, Horizon
from apt_model.schedule.program import Program
from apt_model.schedule.runner import Change, ScheduleRunner
from apt_model.schedule.spec import Curriculum
from apt_model.schedule.targets import BINDINGS, MODULES, Domain
from apt_model.schedule.times import Time

__all__ = [
    "BINDINGS",
    "MODULES",
    "Anneal",
    "Change",
    "Clock",
    "Curriculum",
    "Domain",
    "Horizon",
    "Program",
    "ScheduleRunner",
    "Time",
]
