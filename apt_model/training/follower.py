"""The names that :mod:`apt_model.training.schedule_driver` had before; loops that were written then keep working."""

from apt_model.training.schedule_driver import ScheduleDriver as Follower
from apt_model.training.schedule_driver import Switches, Values, bind, numbers, restore_model, sizes, subject_of

__all__ = ["Follower", "Switches", "Values", "bind", "numbers", "restore_model", "sizes", "subject_of"]
