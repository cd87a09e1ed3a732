"""Temporary."""

from contextlib import contextmanager
from types import SimpleNamespace


class Ranks:
    @staticmethod
    def here():
        return SimpleNamespace(rank=0)


@contextmanager
def process_group():
    yield SimpleNamespace(rank=0)


def barrier():
    pass
