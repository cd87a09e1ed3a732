"""Watches a run: a step that stalls, memory that runs out, a loss that jumps, experts that get no tokens."""

from __future__ import annotations

import faulthandler
import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from apt_model.files import open_kept
from apt_model.layers.in_place import moe_layers
from apt_model.limits import Memory, memory_limits
from apt_model.schedule import Change
from apt_model.training.callbacks import Callback, TrainerView

logger = logging.getLogger(__name__)

GIB = 2**30


class SpikeWatch(Callback):
    """Logs the loss before and after a module was switched, and warns if it jumps.

    A jump is one of the mean over ``short`` updates above that of the ``window`` updates before the switch, by more than
    three of their standard deviations; within ``window`` updates of the switch, and once for each.
    """

    def __init__(self, window: int = 20, short: int = 5) -> None:
        self.losses: deque[Tensor] = deque(maxlen=window)  # read after a switch only: to read them waits for the device
        self.window = window
        self.short = short
        self.armed: tuple[str, float, float, float, deque[Tensor]] | None = None
        self.left = 0

    def on_schedule(self, trainer: TrainerView, changes: Sequence[Change]) -> None:
        """Record the losses before a switch."""
        switched = [change for change in changes if isinstance(change.value, bool)]
        if switched and len(self.losses) >= self.short:
            names = " and ".join(change.switch for change in switched)
            where = f"{names} at {trainer.clock}"
            before = [float(loss) for loss in self.losses]
            self.armed = (
                where,
                statistics.mean(before),
                statistics.pstdev(before),
                statistics.mean(before[-self.short :]),
                deque(maxlen=self.short),
            )
            self.left = self.window

    def on_step(self, trainer: TrainerView) -> None:
        """Compare."""
        self.losses.append(trainer.last_loss)
        if self.armed is None:
            return
        where, before, deviation, just_before, after = self.armed
        after.append(trainer.last_loss)
        self.left -= 1
        now = statistics.mean(map(float, after))
        if len(after) == self.short and now > before + 3 * deviation:
            logger.warning(
                "%s: train/loss rose from %.4f (mean of the updates before, deviation %.4f) to %.4f (mean of %d updates to "
                "step %d). If it stays: a lower optimizer.lr there, or a larger capacity.",
                where,
                before,
                deviation,
                now,
                self.short,
                trainer.clock.step,
            )
            self.armed = None
        elif self.left == self.window - self.short:
            logger.info(
                "%s: train/loss %.4f before, %.4f after (means of %d updates)",
                where,
                just_before,
                now,
                self.short,
            )
        elif self.left == 0:
            self.armed = None


class CollapseWatch(Callback):
    """Warns once, with numbers, if the routing of some layer collapses.

    It has where a quarter of the experts get no token, or where the load is as uneven as if only half of them were in use
    (the exponential of its entropy, which is their number if it is even); in every row with metrics of layers for ``updates``
    updates, three rows at least.
    """

    def __init__(self, updates: int = 50, rows: int = 3) -> None:
        self.updates = updates
        self.rows = rows
        self.since: dict[int, tuple[int, int]] = {}  # of a layer that looks collapsed: first step, rows
        self.warned = False

    def on_step(self, trainer: TrainerView) -> None:
        """Look at the update's row, if it has one."""
        row, step = trainer.last_row, trainer.clock.step
        if self.warned or row.get("step") != step or "moe/layer_00/load_entropy" not in row:
            return
        for number, layer in enumerate(moe_layers(trainer.model)):
            dead = row[f"moe/layer_{number:02}/dead_experts"]
            used = math.exp(row[f"moe/layer_{number:02}/load_entropy"])
            if dead < layer.num_experts / 4 and used >= layer.num_experts / 2:
                self.since.pop(number, None)
                continue
            first, rows = self.since.get(number, (step, 0))
            self.since[number] = first, rows + 1
            if step - first >= self.updates and rows + 1 >= self.rows:
                logger.warning(
                    "%s: the routing of layer %d has collapsed since step %d: %d of its %d experts get no token, and the load "
                    "is as uneven as if %.1f were in use. A larger moe.balance_loss_weight (it is %g), a higher "
                    "moe.temperature or schedule.route_temp, moe.jitter, or moe.router=sigmoid spread it.",
                    trainer.clock,
                    number,
                    first,
                    dead,
                    layer.num_experts,
                    used,
                    layer.balance_loss_weight.item(),
                )
                self.warned = True
                return


def host_memory(root: Path = Path("/")) -> Memory | None:
    """Return the memory of this process's control group with the least left, where one has a limit, else of the machine.

    What the system would give back at once (cached files) is not in use. None: unknown.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    if limits := memory_limits(root):
        return min(limits, key=lambda memory: memory.total - memory.used)
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return Memory((kib["MemTotal"] - kib["MemAvailable"]) * 1024, kib["MemTotal"] * 1024)
    except (OSError, ValueError, KeyError):
        return None


def device_memory(device: torch.device) -> Memory | None:
    """Return the memory of a CUDA device, without what torch holds for later; None: there is none."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Memory(total - free - cached, total)


class Watchdog(Callback):
    """A thread that looks after a run: warns of a step that stalls, and once of memory that is nearly full.

    Where every Python thread stands is dumped by the interpreter's own fault handler, which works even where one of them holds
    the interpreter and hangs.

    Args:
        log: the file that gets the dumps.
        stall_seconds: after which a step stalls; None: never.
        nearly_full: share of the memory in use.
        every: seconds between looks.
        memory: what to look at; None: the host, and the trainer's device.
    """

    def __init__(
        self,
        log: Path,
        *,
        stall_seconds: float | None,
        nearly_full: float = 0.95,
        every: float = 5.0,
        memory: Callable[[], dict[str, Memory | None]] | None = None,
    ) -> None:
        self.log = log
        self.stall_seconds = stall_seconds
        self.nearly_full = nearly_full
        self.every = min(every, stall_seconds / 4) if stall_seconds else every
        self.memory = memory
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._progress = self._armed = 0.0

    def on_train_begin(self, trainer: TrainerView) -> None:
        """Begin to look."""
        device = trainer.device
        self.memory = self.memory or (lambda: {"the host": host_memory(), str(device): device_memory(device)})
        self._file = open_kept(self.log, append=True)
        self._note()
        self._thread = threading.Thread(target=self._look, args=(trainer,), name="watchdog", daemon=True)
        self._thread.start()

    def on_batch_end(self, trainer: TrainerView) -> None:
        """Note the time of progress."""
        self._note()

    def on_step(self, trainer: TrainerView) -> None:
        """Note the time of progress."""
        self._note()

    def on_epoch_end(self, trainer: TrainerView) -> None:
        """Note the time of progress."""
        self._note()

    def on_train_end(self, trainer: TrainerView) -> None:
        """Look no more."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()

    def _note(self) -> None:
        self._progress = time.monotonic()
        if self.stall_seconds and self._progress - self._armed > self.stall_seconds / 20:
            self._armed = self._progress
            faulthandler.dump_traceback_later(self.stall_seconds, file=self._file)

    def _look(self, trainer: TrainerView) -> None:
        stalled = 0.0  # the progress after which a stall was reported
        warned: set[str] = set()
        while not self._ended.wait(self.every):
            stands = time.monotonic() - self._progress
            if self.stall_seconds and stands > self.stall_seconds and stalled != self._progress:
                stalled = self._progress
                logger.warning(
                    "%s: no batch has ended for %.0f s (trainer.stall_minutes). Where every thread stands is in %s.",
                    trainer.clock,
                    stands,
                    self.log,
                )
            assert self.memory is not None
            for name, memory in self.memory().items():
                if memory and name not in warned and memory.used > self.nearly_full * memory.total:
                    warned.add(name)
                    logger.warning(
                        "the memory of %s is nearly full: %.1f of %.1f GiB. A lower trainer.batch_size with a higher "
                        "trainer.accumulate needs less; a job gets more by launch.mem_gb.",
                        name,
                        memory.used / GIB,
                        memory.total / GIB,
                    )
