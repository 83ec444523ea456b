"""Hypothesis draws the same examples in every run, so that a test turns red for what was changed and not for the dice.

HYPOTHESIS_PROFILE=dice draws others each time, as one does to look for faults.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import postgres

settings.register_profile("same", derandomize=True)
settings.register_profile("dice", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    with postgres.running() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: postgres.Server) -> Iterator[str]:
    """A database that holds an empty store."""
    with postgres_server.empty_store() as url:
        yield url
