"""For processes that tests do not fork: hold a run as tests/hold.py says, once the trainer has been loaded."""

import importlib.abc
import importlib.machinery
import os
import sys

TRAINER = "apt_model.training.trainer"


class Finder(importlib.abc.MetaPathFinder):
    """Finds the trainer as others do, and adds to what loading it does."""

    def find_spec(self, name, path=None, target=None):
        if name != TRAINER:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        load = found.loader.exec_module

        def loaded(module):
            load(module)
            sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../.."))  # noqa: PTH118, PTH120
            from tests import hold

            sys.path.pop(0)
            hold.install()

        found.loader.exec_module = loaded
        return found


if "APT_TESTS_HOLD" in os.environ:
    sys.meta_path.insert(0, Finder())
