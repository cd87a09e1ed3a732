"""``python -m apt_launch.sweep``."""

from __future__ import annotations

from apt_launch.sweep.cli import main
from apt_launch.sweep.cli import parser as parser

if __name__ == "__main__":
    main()
