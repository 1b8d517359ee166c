"""Count how many answers of a finished demo batch are right.

Usage: `python tools/check_demo.py examples/demo/answers.jsonl results.jsonl --at-least 0.95`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from demo_tasks import is_correct


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line; empty lines are skipped."""
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]


def reply_text(result: dict[str, Any]) -> str | None:
    """Take the reply out of one line of a batch output file; a failed request has none."""
    response = result.get("response") or {}
    choices = (response.get("body") or {}).get("choices")
    if result.get("error") or not choices:
        return None
    return choices[0]["message"]["content"] or ""


def find_problems(expected: list[str], found: list[str]) -> list[str]:
    """Name what makes a result file unfit: every id must appear exactly once, and no other."""
    counts = Counter(found)
    missing = [custom_id for custom_id in expected if custom_id not in counts]
    doubled = [custom_id for custom_id, count in counts.items() if count > 1]
    unknown = sorted(counts.keys() - set(expected))
    problems = []
    for label, ids in (("missing", missing), ("doubled", doubled), ("unknown", unknown)):
        if ids:
            problems.append(f"{len(ids)} {label} ids, first {ids[0]}")
    return problems


def count_right(answers: dict[str, str], replies: dict[str, str | None]) -> Counter[str]:
    """Count right replies per kind; the kind is the custom id without its number."""
    right: Counter[str] = Counter()
    for custom_id, answer in answers.items():
        reply = replies.get(custom_id)
        if reply is not None and is_correct(answer, reply):
            right[kind_of(custom_id)] += 1
    return right


def kind_of(custom_id: str) -> str:
    """Give the kind of task from an id such as `roman-0007`."""
    return custom_id.rsplit("-", 1)[0]


def print_counts(answers: dict[str, str], right: Counter[str]) -> None:
    """Print one line per kind and one for all."""
    for kind, total in Counter(map(kind_of, answers)).items():
        print(f"{kind:12} {right[kind]:4} of {total:4}  {right[kind] / total:.1%}")
    print(f"{'all':12} {right.total():4} of {len(answers):4}  {right.total() / len(answers):.1%}")


def main() -> int:
    """Compare the two files and return the exit status."""
    parser = argparse.ArgumentParser(description="Count the right answers of a demo batch.")
    parser.add_argument("answers", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--at-least", type=float, default=0.95, help="share that must be right")
    options = parser.parse_args()
    answers = {line["custom_id"]: line["answer"] for line in read_lines(options.answers)}
    results = read_lines(options.results)
    problems = find_problems(list(answers), [line["custom_id"] for line in results])
    right = count_right(answers, {line["custom_id"]: reply_text(line) for line in results})
    print_counts(answers, right)
    for problem in problems:
        print(problem, file=sys.stderr)
    enough = right.total() >= options.at_least * len(answers)
    if not enough:
        print(f"fewer than {options.at_least:.1%} are right", file=sys.stderr)
    return 0 if enough and not problems else 1


if __name__ == "__main__":
    sys.exit(main())
