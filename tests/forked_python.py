"""``python -m MODULE ...``, forked from the process that has loaded everything (tests/forks.py); anything else as it is.

It stands for the child that Python's caller started: signals that ask for something are passed on, the child is killed with it,
and its exit code is the child's.
"""

import array
import json
import os
import signal
import socket
import sys


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "-u"]
    where = os.environ.get("APT_TESTS_FORKS")
    if (
        where is None or arguments[:1] != ["-m"] or arguments[1] == "submitit.local._local"
    ):  # a job's number is its own pid
        python = os.environ["APT_TESTS_PYTHON"]
        os.execv(python, [python, *sys.argv[1:]])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(where)
    ending = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    ignored = [int(number) for number in ending if signal.getsignal(number) is signal.SIG_IGN]
    asked = {"argv": arguments[1:], "cwd": os.getcwd(), "env": dict(os.environ), "session": False}  # noqa: PTH109
    mask = os.umask(0o077)
    os.umask(mask)
    asked |= {"forks": True, "bound": True, "ignored": ignored, "umask": mask}
    content = json.dumps(asked).encode() + b"\n"
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    sent = connection.sendmsg([content], rights)
    connection.sendall(content[sent:])
    answers = connection.makefile("r")
    pid = int(answers.readline())
    for number in {*ending} - {*ignored}:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    code = int(answers.readline() or -signal.SIGKILL)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


main()
