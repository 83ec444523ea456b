"""So much work in one turn of the loop, and all of it in the end. On a real loop; only work moves the clock."""

from __future__ import annotations

import asyncio
from collections import Counter

from iccache.turns import Turns

TAKES_S = 0.002
FULL_S = 0.005


class World:
    """A loop whose turns are counted, and work that takes as long as it says."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turn = 0
        self.turns = Turns(FULL_S, lambda: self.now)
        self.done: list[tuple[str, int]] = []  # who, in which turn
        asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self.turn += 1
        asyncio.get_running_loop().call_soon(self._next)

    async def work(self, name: str, *, begun: bool = False, takes_s: float = TAKES_S) -> None:
        await self.turns.room(begun=begun)
        self.now += takes_s
        self.done.append((name, self.turn))

    def names(self) -> list[str]:
        return [name for name, _ in self.done]


async def test_a_turn_has_so_much_work_and_all_of_it_is_done_in_order() -> None:
    world = World()
    await asyncio.gather(*(world.work(str(i)) for i in range(100)))
    assert world.names() == [str(i) for i in range(100)]
    most = max(Counter(turn for _, turn in world.done).values())
    assert 2 <= most <= 3, "5 ms have room for a third of 2 ms that begins in time"


async def test_a_turn_is_full_when_it_is_full_whatever_was_expected() -> None:
    """Many that take next to nothing, as prompts do that are known, and then dear ones."""
    world = World()
    await asyncio.gather(*(world.work(f"cheap {i}", takes_s=0.0001) for i in range(500)))
    dear = [world.work(f"dear {i}") for i in range(50)]
    mixed = [world.work(f"mixed {i}", takes_s=TAKES_S if i % 7 == 0 else 0.0001) for i in range(70)]
    await asyncio.gather(*dear, *mixed)
    assert world.names()[500:] == [f"dear {i}" for i in range(50)] + [f"mixed {i}" for i in range(70)]
    took: Counter[int] = Counter()
    for name, turn in world.done:
        took[turn] += 20 if name.startswith("dear") or (name.startswith("mixed") and int(name[6:]) % 7 == 0) else 1
    assert max(took.values()) <= 50 + 20  # tenths of a millisecond: a full turn, and what begins just in time


async def test_without_it_all_is_done_in_one_turn() -> None:
    world = World()
    world.turns.full_after_s = 10.0
    await asyncio.gather(*(world.work(str(i)) for i in range(100)))
    assert len({turn for _, turn in world.done}) == 1


async def test_what_takes_longer_than_a_turn_has_one_for_itself() -> None:
    world = World()
    world.turns.full_after_s = TAKES_S / 10
    await asyncio.gather(*(world.work(str(i)) for i in range(20)))
    assert len({turn for _, turn in world.done}) == 20


async def test_who_comes_alone_waits_for_nobody() -> None:
    world = World()
    for i in range(20):
        before = world.turn
        await world.work(str(i))
        assert world.turn == before
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not world.turns.waiting


async def test_what_was_begun_goes_on_before_anything_is_begun() -> None:
    world = World()
    new = [asyncio.create_task(world.work(f"new {i}")) for i in range(10)]
    await asyncio.sleep(0)  # some have had their turn, the others wait
    waiting = world.turns.waiting
    assert 0 < waiting < 10
    begun = [asyncio.create_task(world.work(f"begun {i}", begun=True)) for i in range(5)]
    await asyncio.gather(*new, *begun)
    after = world.names()[10 - waiting :]
    assert [name for name in after if name.startswith("begun")] == [f"begun {i}" for i in range(5)]
    before_them = [name for name in after[: after.index("begun 4")] if name.startswith("new")]
    assert len(before_them) <= 3 < waiting, "no more than had been woken already"
    assert [name for name in world.names() if name.startswith("new")] == [f"new {i}" for i in range(10)]


async def test_who_left_while_waiting_holds_up_nobody() -> None:
    world = World()
    tasks = [asyncio.create_task(world.work(str(i))) for i in range(30)]
    await asyncio.sleep(0)
    for task in tasks[10:20]:
        task.cancel()
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks, return_exceptions=True)
    assert world.names() == [str(i) for i in [*range(10), *range(20, 30)]]
    assert not world.turns.waiting
    await world.work("afterwards")
