"""What the place of examples costs in a conversation: new prompt tokens and time to first token, on a real engine.

    python -m tests.bench.placement [--model FILE.gguf] [--conversations 3]

Six turns with SmolLM2-135M on llama.cpp, one thread, through the proxy in this process. The engine keeps what it has
computed of a prompt's beginning and says how much of each prompt was new. The conversation is of its own answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from iccache.demo.models import STUDENT, default_folder, fetch
from iccache.demo.servers import model_server
from tests.e2e.world import World, world

SYSTEM = (
    "You are the assistant of a travel agency. You answer questions about countries: their capitals, languages, money "
    "and food. Answer in one short sentence, without any introduction, and say so when you do not know."
)
COUNTRIES = {
    "France": ("Paris", "French", "the euro", "onion soup"),
    "Japan": ("Tokyo", "Japanese", "the yen", "ramen"),
    "Brazil": ("Brasilia", "Portuguese", "the real", "feijoada"),
    "Poland": ("Warsaw", "Polish", "the zloty", "pierogi"),
    "Kenya": ("Nairobi", "Swahili and English", "the shilling", "ugali"),
    "India": ("New Delhi", "Hindi and English", "the rupee", "biryani"),
}
QUESTIONS = (
    "What is the capital of {}, and what should one see there in three days?",
    "Which language do people speak in {}, and how far does one get with English?",
    "What is the money of {} called, and where is it best to change some of it?",
    "Which dish of {} should every visitor have tried at least once, and where?",
)
ASKED = ("Peru", "Egypt", "Norway")
TURNS = (0, 1, 2, 3, 0, 2)  # which of the questions, in the order of a conversation
PLACES = ("none", "start", "end")


class Turn(NamedTuple):
    new_tokens: int
    cached_tokens: int
    first_token_s: float


async def measure(url: str, place: str, conversations: int) -> list[list[Turn]]:
    """Of each conversation, its turns."""
    small = {"base_url": url, "model": STUDENT.name, "context_window_tokens": 2048}
    placement = {"placement": "end" if place == "end" else "start"}
    with tempfile.TemporaryDirectory() as folder:
        async with world(Path(folder), small=small, selection=placement) as w:
            for country, facts in COUNTRIES.items():
                for question, fact in zip(QUESTIONS, facts, strict=True):
                    messages = [{"role": "user", "content": question.format(country)}]
                    await w.teach("", f"It is {fact}, as everybody there will tell you.", messages=messages)
            return [await _conversation(w, place, ASKED[i % len(ASKED)], i) for i in range(conversations)]


async def _conversation(w: World, place: str, country: str, number: int) -> list[Turn]:
    messages = [{"role": "system", "content": f"{SYSTEM} Today is day {number} of the trip."}]
    turns = []
    for i, which in enumerate(TURNS):
        name = country if i < 4 else "its neighbours"
        messages.append({"role": "user", "content": QUESTIONS[which].format(name)})
        turn, answer = await _ask(w, messages, 0 if place == "none" else 3)
        turns.append(turn)
        messages.append({"role": "assistant", "content": answer})
    return turns


async def _ask(w: World, messages: list[dict[str, str]], examples: int) -> tuple[Turn, str]:
    body = {"model": "small", "messages": messages, "stream": True, "max_tokens": 24, "temperature": 0}
    headers = {"x-iccache-examples": str(examples)}
    started, first, text, timings = time.monotonic(), 0.0, "", {}
    async with w.http.post(w.url + "/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert response.headers["x-iccache-examples"] == str(examples)
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            said = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if said and not first:
                first = time.monotonic() - started
            text += said or ""
            timings = event.get("timings", timings)
    return Turn(timings["prompt_n"], timings.get("cache_n", 0), first), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="the GGUF file; default: that of the demo")
    parser.add_argument("--conversations", type=int, default=3)
    given = parser.parse_args()
    path = given.model or fetch(default_folder(), print, [STUDENT])[STUDENT.name]
    columns = [*(f"turn {i + 1}" for i in range(len(TURNS))), "all turns", "first token, turns 2-6"]
    print("| examples | " + " | ".join(columns) + " |")
    print("|---" * (len(TURNS) + 3) + "|")
    for place in PLACES:
        with tempfile.TemporaryDirectory() as logs, model_server(STUDENT, path, Path(logs)) as url:
            found = asyncio.run(measure(url, place, given.conversations))
        by_turn = [statistics.mean(c[i].new_tokens for c in found) for i in range(len(TURNS))]
        waits = sorted(t.first_token_s for c in found for t in c[1:])
        cells = [f"{n:.0f}" for n in by_turn] + [f"{sum(by_turn):.0f}"]
        spread = f"{statistics.median(waits):.2f} s ({waits[0]:.2f} to {waits[-1]:.2f})"
        print(f"| {place} | " + " | ".join(cells) + f" | {spread} |", flush=True)


if __name__ == "__main__":
    main()
