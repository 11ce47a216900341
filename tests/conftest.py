"""What all tests share: a seed that rotates and is printed, a cache of the session's own, and the oracle."""

from __future__ import annotations

import os
import random
import tempfile

import pytest

# Before anything of the package looks for its cache.
_CACHE = tempfile.TemporaryDirectory(prefix="na_compiler-test-cache-")
os.environ.setdefault("NA_COMPILER_CACHE", _CACHE.name)
# What was tuned on this machine plays no part.
os.environ["NA_COMPILER_TUNED"] = "0"
# Nor what other tests met before: each layout has a kernel of its own.
os.environ["NA_COMPILER_SPECIALIZE"] = "always"
_SEED = int(os.environ.setdefault("NA_COMPILER_TEST_SEED", str(random.SystemRandom().randrange(2**31))))


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run what takes long as well")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="takes long: runs with --full (make test-full)")
        for item in items:
            if "full" in item.keywords:
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"seed {_SEED} (NA_COMPILER_TEST_SEED={_SEED} repeats this run)")


@pytest.fixture(scope="session")
def session_seed():
    return _SEED


@pytest.fixture
def seed(request, session_seed):
    """A seed of the test's own, that changes from run to run."""
    import torch

    value = (session_seed + sum(map(ord, request.node.name))) % 2**31
    torch.manual_seed(value)
    random.seed(value)
    return value
