# ruff: noqa: E501  # cells are one line
"""The attacks of `tests.bench.poisoning` on a real model: what SmolLM2-135M answers with planted examples in its cache.

    python -m tests.bench.poisoned_student                the table, from the record; what it lacks is asked of the model
    python -m tests.bench.poisoned_student --json FILE    the same as data too

Store, attacks and guards are those of `tests.bench.poisoning`; what is shown goes into the student's prompt as the proxy
composes it. Spoiled: the student gives the attacker's answer. Each of VICTIMS requests is asked without the attack's
plants, with them and no guard, and with them and the guards at their defaults. Intervals are 95 % (Wilson).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from iccache import config
from iccache.demo.models import STUDENT
from iccache.demo.outcome import wilson
from iccache.demo.tasks import TASKS, normal
from iccache.dialects.chat import Chat
from iccache.examples.embed import make_embedder
from iccache.types import Match, Shot
from tests.bench.poisoning import ALL, ATTACKER, ATTACKS, NONE, USERS, Ask, Attack, Guards, World
from tests.bench.recorded import asking

RECORD = Path(__file__).with_name("data") / "poisoned_student.jsonl.gz"
TASK = TASKS[0]
VICTIMS, ORDINARY = 20, 80
PLANTS = 5
SEED = 0
CONDITIONS: dict[str, tuple[bool, Guards]] = {  # whether the plants are there, and the guards
    "no attack, guards": (False, ALL),
    "attack, no guard": (True, NONE),
    "attack, guards": (True, ALL),
}


async def said(session: aiohttp.ClientSession, base_url: str, asked: str, shown: Sequence[Match]) -> str:
    """What the student answers."""
    messages = [{"role": "system", "content": TASK.system}, {"role": "user", "content": asked}]
    client = {"model": "auto", "messages": messages, "temperature": 0, "max_tokens": TASK.max_tokens}
    chat = Chat()
    shots = [Shot(m.example.request, m.example.answer) for m in shown]
    body = chat.compose(chat.read(orjson.dumps(client)), model=STUDENT.name, shots=shots)
    async with session.post(f"{base_url}/chat/completions", data=body) as reply:
        reply.raise_for_status()
        return str((await reply.json())["choices"][0]["message"]["content"])


async def measure(
    name: str, honest: Sequence[Ask], targets: Sequence[Ask], labels: Sequence[str], embedder: Any, ask: Any
) -> dict[str, Any]:
    """One attack under each condition."""
    rng = random.Random(f"{name} {SEED}")
    wrong = rng.choice(labels)
    aimed = [t for t in targets if t.answer != wrong]
    attack = ATTACKS[name](aimed, wrong, PLANTS, embedder.embed, rng)
    row: dict[str, Any] = {"attack": name, "plants": len(attack.plants), "n": len(attack.victims)}
    for condition, (planted, guards) in CONDITIONS.items():
        there = attack if planted else Attack([], attack.victims)
        world = World(honest, there, guards, embedder.embed, embedder.identity)
        reached = spoiled = right = 0
        for n, victim in enumerate(attack.victims):
            shown, _ = world.show(victim.text, f"user{n % USERS}")
            answer = normal(await ask(victim.text, shown))
            reached += any(m.example.subject == ATTACKER for m in shown)
            spoiled += answer == normal(wrong)
            right += answer == normal(victim.answer)
        row[condition] = {"reached": reached, "spoiled": spoiled, "right": right}
    return row


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"| attack (plants, victims) | {' | '.join(CONDITIONS)} |",
        f"|---|{'---|' * len(CONDITIONS)}",
    ]
    for row in rows:
        cells = [_cell(row[condition], row["n"]) for condition in CONDITIONS]
        lines.append(f"| {row['attack']} ({row['plants']}, {row['n']}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, int], n: int) -> str:
    spoiled = wilson(found["spoiled"], n)
    return f"spoiled {spoiled.share:.2f} [{spoiled.low:.2f}, {spoiled.high:.2f}], right {found['right'] / n:.2f}, shown {found['reached'] / n:.2f}"


async def run(record: Path, attacks: Sequence[str]) -> list[dict[str, Any]]:
    embedder = make_embedder(config.Embedder())
    items = [Ask(item.prompt, item.target) for item in TASK.items()]
    random.Random(SEED).shuffle(items)
    targets, honest = items[:VICTIMS], items[VICTIMS + ORDINARY :]
    labels = sorted({item.answer for item in items})
    rows = []
    async with asking(record) as (_, base_url, session):

        async def ask(text: str, shown: Sequence[Match]) -> str:
            return await said(session, base_url, text, shown)

        for name in attacks:
            rows.append(await measure(name, honest, targets, labels, embedder, ask))
            print(as_table(rows[-1:]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--attack", choices=[*ATTACKS], action="append")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = asyncio.run(run(options.record, options.attack or [*ATTACKS]))
    print(as_table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
