from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.forks import Forks


@pytest.fixture(scope="package")
def forks() -> Iterator[Forks]:
    """Run commands without the seconds that loading torch takes."""
    forks = Forks()
    yield forks
    forks.close()
