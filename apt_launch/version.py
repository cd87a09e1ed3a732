"""The version of this package, and what differs between those of Hydra."""

from functools import cache

__version__ = "0.1.0"


@cache
def is_hydra_before_1_4() -> bool:
    """Return whether Hydra is of a version before 1.4."""
    from hydra import __version__ as version

    return tuple(map(int, version.split(".")[:2])) < (1, 4)
