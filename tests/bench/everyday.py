"""Everyday requests of twelve kinds, some thousand of each, in many wordings: what an application's users might type.

`TUNED` were looked at while the router's constants were chosen, `HELD_OUT` only afterwards.
"""

from __future__ import annotations

import itertools
import random
from string import Formatter

WORDS = """\
name: Anna | Boris | Chiara | Deniz | Elif | Farid | Greta | Hugo | Ines | Jonas | Kofi | Lena | Mateo | Nadia | Omar
    | Priya | Quinn | Rosa

city: Lisbon | Oslo | Nairobi | Lima | Hanoi | Quebec | Tbilisi | Porto | Ghent | Kyoto | Cusco | Tallinn | Marrakesh
    | Bergen

food: lentils | aubergines | salmon | rye flour | chickpeas | tofu | pumpkin | leeks | couscous | goat cheese |
    mussels | kale

thing: kettle | backpack | lamp | headset | raincoat | blender | tent | keyboard | office chair | bicycle pump |
    toaster

n: 3 | 4 | 6 | 7 | 8 | 9 | 12 | 14 | 15 | 18 | 24 | 27 | 36 | 45

day: Monday | Tuesday | Wednesday | Thursday | Friday | the weekend | the 3rd of May | the end of the month

language: French | German | Spanish | Turkish | Polish | Portuguese | Swedish | Italian

sentence: The train leaves from platform nine. | I lost my umbrella in the park. | Could you close the window? | We will
    meet after lunch. | The children are asleep already. | My sister works in a hospital. | This soup is too salty
    for me. | The shop opens at eight on Saturdays. | He has never seen the sea.

structure: a list of integers | a dictionary of lists | a string of words | a nested list | two sorted lists

operation: removes duplicates but keeps the order | finds the longest run of equal values | groups items by length |
    rotates everything by k places | counts how often each value occurs | returns the second largest value |
    flattens it by one level | checks whether it is a palindrome

plan: the budget review | our move to the new office | the launch | the hiring round | the audit | the workshop

opinion: it broke after two weeks and nobody answers my mails | best purchase I made this year | works as described,
    nothing special | the colour is nothing like the photo | my mother loves it | arrived a day early and well
    packed | too loud for a small flat | I would buy it again at once

table: orders | customers | invoices | shipments | employees | sensors | bookings

column: region | status | created_at | amount | department | country | rating

clause: the tenant bears minor repairs up to a yearly amount | either party may end the agreement with a month's notice
    | all inventions made during employment belong to the company | the seller is not liable for indirect damage |
    disputes are settled before the courts of the seller's seat | the deposit is returned within sixty days

symptom: a dull headache behind one eye | a tickling cough at night | tingling in two fingers | a swollen ankle |
    heartburn after dinner | a rash on both elbows | a stiff neck since this morning | dizziness on stairs

since: for two days | since last week | after long flights | every spring | whenever I run | for about a month

mood: cheerful | wistful | solemn | playful | dreamy | grim

subject: the first snow | an old lighthouse | a lost glove | my grandmother's kitchen | rain on tin roofs | a night bus

error: timeouts | a certificate error | error 502 | high latency | permission denied | a full disk | a kernel panic

system: the build server | our reverse proxy | a laptop with Debian | the mail gateway | a Kubernetes node | my router
"""


def _slots() -> dict[str, list[str]]:
    entries = (entry.partition(": ") for entry in WORDS.split("\n\n"))
    found = {name: [" ".join(value.split()) for value in values.split("|")] for name, _, values in entries}
    backwards = {"other": "name", "food2": "food", "m": "n"}
    return found | {name: found[of][::-1] for name, of in backwards.items()}


SLOTS = _slots()

TEMPLATES: dict[str, list[str]] = {
    "sums": [
        "{name} has {n} marbles and gives {m} to {other}. How many are left?",
        "A box holds {n} pens. How many pens are in {m} boxes?",
        "If a {thing} costs {n} euros and I pay with {m} notes of ten, what change do I get?",
        "{name} walks {n} km every day. After how many days has it been {m}0 km?",
        "Split {n}0 sweets among {m} children: how many does each get, and what remains?",
        "The bus to {city} takes {n} minutes, the tram {m} minutes longer. How long is the tram ride?",
    ],
    "translation": [
        "Translate into {language}: {sentence}",
        "How do I say this in {language}? {sentence}",
        "{sentence} - what would that be in {language}, please",
        "Please give me the {language} version of the following. {sentence}",
        "I am in {city} and must tell somebody: {sentence} Write it in {language}.",
    ],
    "code": [
        "Write a Python function that takes {structure} and {operation}.",
        "I need code that {operation}, given {structure}. No libraries, please.",
        "What is the fastest way to get a function which {operation} for {structure}? Show me.",
        "Given {structure}, implement something that {operation}, with type hints.",
        "Can you refactor my loop? It {operation} and the input is {structure}.",
    ],
    "letters": [
        "Draft a short mail to {name} asking to postpone {plan} to {day}.",
        "I have to tell {name} that {plan} is cancelled. Make it polite.",
        "Write to {name} and {other}: thank them for their help with {plan}.",
        "Answer this for me: {name} wants to know by {day} who takes over {plan}.",
        "A reminder for everybody that {plan} is due on {day}, friendly but firm, signed {name}.",
    ],
    "cooking": [
        "What can I cook with {food} and {food2}?",
        "How long do I roast {food} at 200 degrees?",
        "Give me a quick dinner for {n} people with {food}, no meat.",
        "Can I freeze {food} together with {food2}, and for how long?",
        "My {food} turned out bitter. What went wrong and how can {food2} save it?",
    ],
    "reviews": [
        "Is this review positive, negative or neutral? About the {thing}: {opinion}",
        "Label the sentiment: '{opinion}' (product: {thing})",
        "{name} wrote of the {thing}: {opinion}. Happy customer or not?",
        "Classify: {opinion}. It is about a {thing} sent to {city}.",
    ],
    "travel": [
        "What should I see in {city} in {n} hours?",
        "Is {city} safe to walk around at night, travelling alone with a {thing}?",
        "Plan {n} days in {city} for {name} and two children, arriving on {day}.",
        "Which neighbourhood of {city} would you stay in for a trip around {day}?",
        "How do I get from the airport to the centre of {city} with heavy luggage?",
    ],
    "queries": [
        "SQL: the {n} {table} with the highest {column}",
        "Show all {table} whose {column} is empty, newest first, as a query",
        "How many {table} are there per {column}? Write the select statement.",
        "I want to join {table} with their {column} history and keep only the last {n} days",
        "Which index helps when we filter {table} by {column}? Give me the DDL.",
    ],
    "contracts": [
        "What does this mean for me: {clause}?",
        "My landlord says that {clause}. Is that usual?",
        "Explain in plain words the clause under which {clause}.",
        "Should {name} sign a contract where {clause}?",
        "Rewrite more mildly: {clause}.",
    ],
    "symptoms": [
        "I have had {symptom} {since}. Should I see a doctor?",
        "What could cause {symptom} {since}?",
        "{name} complains of {symptom}; what can be done at home?",
        "Is {symptom} dangerous when it comes {since}, at {n}0 years of age?",
    ],
    "verses": [
        "Write a {mood} poem about {subject}.",
        "Four lines, {mood}, on {subject}, rhyming.",
        "A haiku for {name} on {subject}",
        "Continue this: 'Of {subject} I dreamt' and keep it {mood}",
        "Make a {mood} song of {subject}, set in {city}.",
    ],
    "outages": [
        "{system} shows {error} since {day}. Where do I look first?",
        "How do I debug {error} on {system}?",
        "After the update {system} gives {error} {n} times an hour. Ideas?",
        "Which log tells me why {system} reports {error}?",
        "Write a runbook entry for {error} at {system}.",
    ],
}
TUNED = ("sums", "translation", "code", "letters", "cooking", "reviews")
HELD_OUT = ("travel", "queries", "contracts", "symptoms", "verses", "outages")
MOST = 1000


def texts(kind: str) -> tuple[str, ...]:
    """Up to `MOST` different requests of the kind, in a fixed shuffled order, every template equally often."""
    shuffled = random.Random(f"everyday {kind}")
    by_template = []
    for template in TEMPLATES[kind]:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name]
        filled = [
            template.format(**dict(zip(fields, values, strict=True)))
            for values in itertools.product(*(SLOTS[name] for name in fields))
        ]
        by_template.append(shuffled.sample(filled, min(len(filled), MOST // len(TEMPLATES[kind]))))
    found = [text for filled in by_template for text in filled]
    shuffled.shuffle(found)
    return tuple(dict.fromkeys(found))
