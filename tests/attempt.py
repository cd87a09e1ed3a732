"""``python -m tests.attempt FOLDER [JOB_ID RESTART]``: perform the job of a sweep that has this folder."""

from __future__ import annotations

import sys
from pathlib import Path

from apt_launch.sweep.jobs.process import perform

if __name__ == "__main__":
    folder, *more = sys.argv[1:]
    sys.exit(perform(Path(folder), **({"job_id": more[0], "restart": int(more[1])} if more else {})))
