"""A real SLURM cluster on this machine: one controller and two nodes with fake GPUs, up in about a second."""

from __future__ import annotations

import fcntl
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.forks import HANGS, attempts

NODES = ("127.0.0.1", "127.0.0.2")
"""Names that are addresses, so that torch.distributed finds a node by its name."""

CORES, MEMORY_MB, GPUS = 8, 8000, 4


class Cluster:
    """Started by ``start``; every daemon, port and file is its own, so that several may run side by side.

    Args:
        accounting: with slurmdbd and MariaDB; without, SLURM has no ``sacct``.
        max_array_size: SLURM's MaxArraySize.
        min_job_age: seconds after which SLURM forgets a job that has ended.
        grace_seconds: what a preempted job has before it is killed; 0: nothing.
        signal_on_preemption: whether preemption sends the job its own warning signal, too.
    """

    def __init__(
        self,
        *,
        accounting: bool = False,
        max_array_size: int = 1001,
        min_job_age: int = 600,
        grace_seconds: int = 10,
        signal_on_preemption: bool = True,
    ) -> None:
        self.accounting = accounting
        self.max_array_size = max_array_size
        self.min_job_age = min_job_age
        self.grace_seconds = grace_seconds
        self.signal_on_preemption = signal_on_preemption
        self.state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.ports, self.keeps_ports = _own_ports(3 + len(NODES))
        self.user = getpass.getuser()
        self.database: subprocess.Popen[bytes] | None = None

    def start(self) -> Cluster:
        """Bring it up; return when all nodes are idle.

        Raises:
            RuntimeError: with the last lines of the daemons' logs.
        """
        try:
            for name in ("etc", "run", "log", "ctld", "gpu", *(f"spool/{node}" for node in NODES)):
                (self.state / name).mkdir(parents=True)
            self.state.chmod(0o755)
            self._start_munge()
            self._write_configs()
            if self.accounting:
                self._start_accounting()
            self.start_controller()
            for node in NODES:
                self._daemon("slurmd", "-N", node)
            self.wait_until(lambda: self._idle() == len(NODES), "all nodes to be idle")
        except BaseException as error:
            logs = self.logs()
            self.stop()
            raise RuntimeError(f"SLURM did not come up: {error}\n{logs}") from error
        return self

    def stop(self) -> None:
        """Stop what was started, and remove every trace."""
        with suppress(Exception):
            self.run("scancel", "-u", self.user, check=False, timeout=5)
            self.wait_until(lambda: not self.run("squeue", "-h", check=False).stdout.strip(), "jobs to end", timeout=60)
        for node in NODES:
            with suppress(Exception):
                self._kill_node_jobs(node)
        for name in (*(f"slurmd.{node}" for node in NODES), "slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._stop_daemon(name)
        if self.database is not None:
            self.database.wait(timeout=HANGS)
        os.close(self.keeps_ports)
        shutil.rmtree(self.state, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """Return the environment in which SLURM's commands talk to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.state / "etc/slurm.conf")}

    def run(self, *command: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Call one of SLURM's commands."""
        done = subprocess.run(command, timeout=timeout, capture_output=True, text=True, env=self.environment())
        if check and done.returncode:
            raise subprocess.CalledProcessError(done.returncode, (*command, done.stderr), done.stdout, done.stderr)
        return done

    def states(self) -> dict[str, str]:
        """Return each job's state, of finished ones too, by its number (``12_3`` in arrays)."""
        shown = self.run("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T").stdout
        return dict(line.strip().split("|") for line in shown.splitlines())

    def wait_until(self, happened: Callable[[], object], what: str, timeout: float = HANGS) -> None:
        """Wait for what the cluster will do."""
        for _ in attempts(timeout):
            with suppress(subprocess.SubprocessError):
                if happened():
                    return
        raise TimeoutError(f"waited {timeout:g} s for {what}\n{self.logs()}")

    def stop_controller(self) -> None:
        """Take the controller away; jobs go on."""
        self._stop_daemon("slurmctld")

    def start_controller(self) -> None:
        """Start the controller, with the state that the last one left."""
        self._daemon("slurmctld")
        self.wait_until(lambda: self.run("scontrol", "ping", timeout=3).stdout.count("UP"), "the controller")

    def kill_slurmd(self, node: str) -> None:
        """Kill only the node's daemon: its jobs' processes live on."""
        os.kill(self._pid(f"slurmd.{node}"), signal.SIGKILL)
        (self.state / f"run/slurmd.{node}.pid").unlink()

    def fail_node(self, node: str) -> None:
        """Take away a node's power: daemon and jobs die at once."""
        pid = self._pid(f"slurmd.{node}")
        os.kill(pid, signal.SIGKILL)
        self._kill_node_jobs(node)
        (self.state / f"run/slurmd.{node}.pid").unlink()

    def start_node(self, node: str) -> None:
        """Give a node its power back."""
        shutil.rmtree(self.state / "spool" / node)
        (self.state / "spool" / node).mkdir()
        self._daemon("slurmd", "-c", "-N", node)

    def node_is_idle(self, node: str) -> bool:
        """Say whether a node can take jobs."""
        return "idle" in self.run("sinfo", "-h", "-N", "-p", "main", "-n", node, "-o", "%T").stdout

    def logs(self) -> str:
        """Return the last lines that the daemons wrote."""
        parts = []
        for path in sorted((self.state / "log").glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-6:]
            parts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(parts)

    def _idle(self) -> int:
        shown = self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False, timeout=3).stdout
        return len(shown.split())

    def _daemon(self, name: str, *arguments: str) -> None:
        subprocess.run(
            [name, *arguments],
            check=True,
            env=self.environment(),
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=HANGS,
        )

    def _pid(self, name: str) -> int:
        return int((self.state / f"run/{name}.pid").read_text())

    def _stop_daemon(self, name: str) -> None:
        path = self.state / f"run/{name}.pid"
        with suppress(OSError, ValueError):
            pid = int(path.read_text())
            os.kill(pid, signal.SIGTERM)
            end = time.monotonic() + 60
            while _lives(pid):
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                    break
                time.sleep(0.02)
            path.unlink(missing_ok=True)

    def _kill_node_jobs(self, node: str) -> None:
        """Kill the steps of a node, told by the log that they write, and all below them."""
        log = self.state / f"log/slurmd.{node}.log"
        for pid in _all_pids():
            with suppress(OSError):
                if "slurmstepd" in Path(f"/proc/{pid}/cmdline").read_text():
                    opened = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
                    if str(log) in opened:
                        for victim in [pid, *_below(pid)]:
                            with suppress(OSError):
                                os.kill(victim, signal.SIGKILL)

    def _start_munge(self) -> None:
        key = self.state / "etc/munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._daemon(
            "munged",
            f"--key-file={key}",
            f"--socket={self.state}/run/munge.sock",
            f"--pid-file={self.state}/run/munged.pid",
            f"--log-file={self.state}/log/munged.log",
            f"--seed-file={self.state}/run/munge.seed",
            "--num-threads=4",
            "--force",
        )

    def _write_configs(self) -> None:
        host, controller, database = socket.gethostname(), self.ports[0], self.ports[1]
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmUser={self.user}",
            f"SlurmdUser={self.user}",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            f"AuthInfo=socket={self.state}/run/munge.sock,cred_expire=5",  # a requeue waits that long
            f"SlurmctldPort={controller}",
            f"SlurmctldPidFile={self.state}/run/slurmctld.pid",
            f"SlurmctldLogFile={self.state}/log/slurmctld.log",
            f"SlurmdPidFile={self.state}/run/slurmd.%n.pid",
            f"SlurmdLogFile={self.state}/log/slurmd.%n.log",
            f"SlurmdSpoolDir={self.state}/spool/%n",
            f"StateSaveLocation={self.state}/ctld",
            "SlurmdParameters=config_overrides",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/linux",
            "JobAcctGatherFrequency=task=1",
            "JobAcctGatherParams=OverMemoryKill",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core_Memory",
            "DefMemPerCPU=1000",
            "GresTypes=gpu",
            "ReturnToService=1",
            "JobRequeue=1",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1,requeue_delay=1",
            "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
            "KillWait=5",
            f"MinJobAge={self.min_job_age}",
            "InactiveLimit=0",
            "SlurmdTimeout=10",
            "SlurmctldTimeout=10",
            "CompleteWait=0",
            "MessageTimeout=10",
            f"MaxArraySize={self.max_array_size}",
            f"FirstJobId={int(time.time()) % 50_000_000 + 1000}",  # no number is used twice
        ]
        if self.signal_on_preemption:
            lines.append("SlurmctldParameters=preempt_send_user_signal")
        if self.accounting:
            lines += [
                "AccountingStorageType=accounting_storage/slurmdbd",
                "AccountingStorageHost=127.0.0.1",
                f"AccountingStoragePort={database}",
                f"AccountingStoragePass={self.state}/run/munge.sock",
                "AccountingStorageTRES=gres/gpu",
            ]
        else:
            lines.append("AccountingStorageType=accounting_storage/none")
        for node, port in zip(NODES, self.ports[3:], strict=True):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CORES} RealMemory={MEMORY_MB} "
                f"Gres=gpu:{GPUS} State=UNKNOWN"
            )
        nodes = ",".join(NODES)
        lines += [
            f"PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE "
            f"GraceTime={self.grace_seconds}",
            f"PartitionName=high Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF",
        ]
        (self.state / "etc/slurm.conf").write_text("\n".join(lines) + "\n")
        for number in range(GPUS):  # they must be character devices
            (self.state / f"gpu/gpu{number}").symlink_to("/dev/null")
        gres = [f"NodeName={node} Name=gpu File={self.state}/gpu/gpu[0-{GPUS - 1}]" for node in NODES]
        (self.state / "etc/gres.conf").write_text("\n".join(gres) + "\n")

    def _start_accounting(self) -> None:
        data, port = self.state / "db", self.ports[2]
        data.mkdir()
        sock = self.state / "run/mysql.sock"
        (self.state / "etc/my.cnf").write_text(
            f"[mariadbd]\nuser={self.user}\ndatadir={data}\nsocket={sock}\npid-file={self.state}/run/mariadbd.pid\n"
            f"log-error={self.state}/log/mariadbd.log\nbind-address=127.0.0.1\nport={port}\ninnodb_log_file_size=16M\n"
            "innodb_buffer_pool_size=64M\ninnodb_flush_log_at_trx_commit=0\ninnodb_lock_wait_timeout=900\n"
            "performance_schema=OFF\n"
        )
        defaults = f"--defaults-file={self.state}/etc/my.cnf"
        subprocess.run(
            ["mariadb-install-db", defaults, f"--user={self.user}", "--auth-root-authentication-method=normal"],
            check=True,
            capture_output=True,
            timeout=HANGS,
        )
        self.database = subprocess.Popen(
            ["mariadbd", defaults],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        admin = ["mariadb", "--no-defaults", "-uroot", "-S", str(sock), "-e"]
        grants = (
            "create database slurm; create user slurm@'127.0.0.1' identified by 'test'; "
            "create user slurm@localhost identified by 'test'; grant all on slurm.* to slurm@'127.0.0.1'; "
            "grant all on slurm.* to slurm@localhost;"
        )
        self.wait_until(lambda: not subprocess.run([*admin, "select 1"], capture_output=True).returncode, "MariaDB")
        subprocess.run([*admin, grants], check=True, capture_output=True)
        path = self.state / "etc/slurmdbd.conf"
        path.write_text(
            f"DbdHost={socket.gethostname()}\nDbdAddr=127.0.0.1\nDbdPort={self.ports[1]}\nSlurmUser={self.user}\n"
            f"AuthType=auth/munge\nAuthInfo=socket={self.state}/run/munge.sock,cred_expire=5\n"
            f"PidFile={self.state}/run/slurmdbd.pid\nLogFile={self.state}/log/slurmdbd.log\n"
            f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStoragePort={port}\nStorageUser=slurm\n"
            "StoragePass=test\nStorageLoc=slurm\n"
        )
        path.chmod(0o600)
        self._daemon("slurmdbd")
        self.wait_until(lambda: _listens(self.ports[1]), "slurmdbd")


def _own_ports(count: int) -> tuple[list[int], int]:
    """Return ports that nobody else has or is given, and the descriptor that keeps them for this process until it is closed.

    Below those that the system gives to connections: one that was merely free a moment ago may be another's when a daemon
    asks for it, which then never comes up.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for first in range(10_000, lowest - count, count):
        lock = os.open(f"{tempfile.gettempdir()}/slurm-ports-{first}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        with suppress(OSError), ExitStack() as bound:  # another cluster's, or in use
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for port in range(first, first + count):
                bound.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count)), lock
        os.close(lock)
    raise RuntimeError(f"no {count} ports in a row are free below {lowest}")


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _lives(pid: int) -> bool:
    """Say whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _all_pids() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _below(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from (int(child), *_below(int(child)))
