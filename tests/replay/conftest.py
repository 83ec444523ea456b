from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.replay.world import World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """An upstream that runs, with a teacher who says q9 to everything."""
    world = World()
    async with world.upstream:
        yield world
