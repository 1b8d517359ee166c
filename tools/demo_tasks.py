"""Small tasks with one right answer, made from a seed.

The demo model learns these tasks and the demo batch asks them. Each answer can be checked by
exact comparison, so a wrong or misplaced result shows at once. Prompts are split by a checksum:
a prompt that the demo may ask is never one that the model was trained on.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

HELD_OUT_SHARE = 8
"""One prompt in this many is kept away from training."""
MOST_TASKS = 600
"""Well beyond this, the kinds with few prompts would run out of held-out ones."""

MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]  # fmt: skip
DAYS_IN_MONTH = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
WORDS = [
    "apple", "bread", "cherry", "desk", "eagle", "fig", "grape", "house", "ink", "jar", "kite",
    "lemon", "moon", "nest", "olive", "pear", "quilt", "river", "stone", "tiger", "umbrella",
    "violin", "water", "yarn", "zebra",
]  # fmt: skip
NAMES = [
    "Ada", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Karin",
    "Leo", "Maria", "Nina", "Oscar", "Paula", "Ravi", "Sara", "Tom", "Uma", "Victor", "Wanda",
    "Yusuf", "Zoe",
]  # fmt: skip
CITIES = [
    "Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Hanoi", "Lima", "Lisbon", "London",
    "Madrid", "Nairobi", "Oslo", "Paris", "Quito", "Rome", "Seoul", "Tokyo", "Vienna", "Warsaw",
    "Zurich",
]  # fmt: skip
COLORS = ["red", "green", "blue", "yellow", "black", "white", "purple", "brown", "pink", "gray"]
ROMAN_SIGNS = {100: "C", 90: "XC", 50: "L", 40: "XL", 10: "X", 9: "IX", 5: "V", 4: "IV", 1: "I"}
UNIT_PAIRS = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("kg", "g", 1000),
    ("l", "ml", 1000),
)


class Task(NamedTuple):
    """One question and its only accepted answer."""

    kind: str
    prompt: str
    answer: str


def _arithmetic(rng: random.Random) -> tuple[str, str]:
    """Sums and differences of numbers up to twelve and up to nine, and the times tables."""
    operation = rng.choice(("add", "subtract", "multiply"))
    if operation == "multiply":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        forms = (
            "What is {a} * {b}?",
            "Multiply {a} by {b}.",
            "{a} * {b} = ?",
            "Calculate {a} * {b}.",
        )
        return rng.choice(forms).format(a=a, b=b), str(a * b)
    a, b = rng.randint(0, 12), rng.randint(0, 9)
    if operation == "add":
        forms = ("What is {a} + {b}?", "Add {a} and {b}.", "{a} + {b} = ?", "Calculate {a} + {b}.")
        return rng.choice(forms).format(a=a, b=b), str(a + b)
    a, b = max(a, b), min(a, b)
    forms = (
        "What is {a} - {b}?",
        "Subtract {b} from {a}.",
        "{a} - {b} = ?",
        "Calculate {a} - {b}.",
    )
    return rng.choice(forms).format(a=a, b=b), str(a - b)


def _tenths(value: int) -> str:
    """Write a number of tenths as a plain decimal; whole numbers get no point."""
    whole, part = divmod(value, 10)
    return f"{whole}.{part}" if part else str(whole)


def _units(rng: random.Random) -> tuple[str, str]:
    """Metric conversions by a power of ten, both ways."""
    large, small, factor = rng.choice(UNIT_PAIRS)
    tenths = rng.choice((rng.randint(1, 99), rng.randint(1, 99) * 10, rng.randint(100, 999)))
    big = f"{_tenths(tenths)} {large}"
    little = f"{tenths * factor // 10} {small}"
    if rng.random() < 0.5:
        source, target, unit = big, little, small
    else:
        source, target, unit = little, big, large
    forms = ("Convert {s} to {u}.", "What is {s} in {u}?", "Express {s} in {u}.")
    return rng.choice(forms).format(s=source, u=unit), target


def _dates(rng: random.Random) -> tuple[str, str]:
    """ISO dates to long dates and back."""
    month = rng.randint(1, 12)
    day, year = rng.randint(1, DAYS_IN_MONTH[month - 1]), rng.randint(1950, 2049)
    iso = f"{year}-{month:02d}-{day:02d}"
    long = f"{day} {MONTHS[month - 1]} {year}"
    if rng.random() < 0.5:
        forms = (
            "Write {d} as a long date.",
            "Spell out the date {d}.",
            "Write the date {d} with the month name.",
        )
        return rng.choice(forms).format(d=iso), long
    forms = (
        "Write {d} as an ISO date.",
        "What is {d} in ISO format?",
        "Give the ISO date for {d}.",
    )
    return rng.choice(forms).format(d=long), iso


def to_roman(number: int) -> str:
    """Write a number from 1 to 399 in Roman numerals."""
    text = ""
    for value, sign in ROMAN_SIGNS.items():
        count, number = divmod(number, value)
        text += sign * count
    return text


def _roman(rng: random.Random) -> tuple[str, str]:
    """Roman numerals to digits and back."""
    number = rng.randint(1, 399)
    roman = to_roman(number)
    if rng.random() < 0.5:
        forms = (
            "Write {n} in Roman numerals.",
            "What is {n} as a Roman numeral?",
            "Convert {n} to Roman numerals.",
        )
        return rng.choice(forms).format(n=number), roman
    forms = (
        "Which number is {n}?",
        "Write the Roman numeral {n} in digits.",
        "Convert {n} to a number.",
    )
    return rng.choice(forms).format(n=roman), str(number)


def _sorting(rng: random.Random) -> tuple[str, str]:
    """Three or four digits or words to put in order."""
    size = rng.randint(3, 4)
    if rng.random() < 0.5:
        words = rng.sample(WORDS, size)
        forms = (
            "Sort these words: {i}.",
            "Put these words in alphabetical order: {i}.",
            "Sort from A to Z: {i}.",
        )
        return rng.choice(forms).format(i=", ".join(words)), ", ".join(sorted(words))
    numbers = rng.sample(range(10), size)
    falling = rng.random() < 0.5
    rising_forms = (
        "Sort in ascending order: {i}.",
        "Sort these numbers from smallest to largest: {i}.",
    )
    falling_forms = (
        "Sort in descending order: {i}.",
        "Sort these numbers from largest to smallest: {i}.",
    )
    form = rng.choice(falling_forms if falling else rising_forms)
    ordered = sorted(numbers, reverse=falling)
    return form.format(i=", ".join(map(str, numbers))), ", ".join(map(str, ordered))


def _json(rng: random.Random) -> tuple[str, str]:
    """Read a value out of a small JSON object, or keep only some of its fields."""
    fields: dict[str, object] = {
        "name": rng.choice(NAMES),
        "age": rng.randint(18, 79),
        "city": rng.choice(CITIES),
        "color": rng.choice(COLORS),
    }
    keys = rng.sample(list(fields), rng.randint(2, 3))
    text = _compact({key: fields[key] for key in keys})
    if len(keys) == 2 or rng.random() < 0.6:
        key = rng.choice(keys)
        get_forms = (
            "{t} What is the {k}?",
            "Read this JSON: {t} What is the {k}?",
            "Give the {k} in {t}",
        )
        return rng.choice(get_forms).format(t=text, k=key), str(fields[key])
    first, second = rng.sample(keys, 2)
    keep_forms = ("{t} Keep only {a} and {b}.", "Return only {a} and {b} as JSON: {t}")
    answer = _compact({first: fields[first], second: fields[second]})
    return rng.choice(keep_forms).format(t=text, a=first, b=second), answer


def _compact(value: Mapping[str, object]) -> str:
    """Write JSON without spaces, the only form used here, so that answers compare exactly."""
    return json.dumps(value, separators=(",", ":"))


MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "arithmetic": _arithmetic,
    "units": _units,
    "dates": _dates,
    "roman": _roman,
    "sorting": _sorting,
    "json": _json,
}


def is_held_out(prompt: str) -> bool:
    """Say on which side of the split a prompt lies, whatever the seed that made it."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def make_task(rng: random.Random, kind: str, held_out: bool) -> Task:
    """Draw prompts of one kind until one lies on the wanted side of the split."""
    while True:
        prompt, answer = MAKERS[kind](rng)
        if is_held_out(prompt) == held_out:
            return Task(kind, prompt, answer)


def generate(seed: int, count: int) -> list[Task]:
    """Make `count` different held-out tasks, the kinds taken in turn."""
    if count > MOST_TASKS:
        raise ValueError(f"at most {MOST_TASKS} different tasks can be made, not {count}")
    rng = random.Random(seed)
    kinds = list(MAKERS)
    tasks: dict[str, Task] = {}
    while len(tasks) < count:
        task = make_task(rng, kinds[len(tasks) % len(kinds)], held_out=True)
        tasks.setdefault(task.prompt, task)
    return list(tasks.values())


def is_correct(answer: str, text: str) -> bool:
    """Compare a reply with the accepted answer; only outer white space is forgiven."""
    return text.strip() == answer.strip()
