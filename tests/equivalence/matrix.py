"""Every architecture of the table under every layout, compared with plain vLLM.

    python -m tests.equivalence.matrix [NAME ...]

prints what was seen, as a table in Markdown.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from elbowroom.core.model import ModelFacts, read_model
from elbowroom.planning.pool.memory import divide_memory
from elbowroom.planning.pool.shares import SHIP_ROWS, plan_shares
from elbowroom.plans.pool import MemoryBudget, PoolShare
from tests.equivalence.architectures import TABLE, Architecture
from tests.equivalence.ranks import (
    KV_BYTES,
    LONGEST,
    MOST_TOKENS,
    Result,
    pooled_case,
    run_ranks,
)

NUM_RANKS = 2
ROUNDING = 0.05
"""The largest difference of log-probabilities that other kernels may make."""

_MODES = ("none", "mapped", "streamed", "shipped")
_COLUMNS = ("model", "plain vLLM", *_MODES, "KV tokens", "KV tokens planned", "in the pool")

ALWAYS = 10**6
"""Rows below which an iteration ships them: all of them."""


@dataclass(frozen=True)
class Seen:
    """What one architecture gave: plain vLLM's result, and each rank's under every layout.

    ``budget`` is the account for the same cache.
    """

    budget: MemoryBudget
    plain: Result
    layouts: Mapping[str, Sequence[Result]]


def layouts_of(architecture: Architecture) -> tuple[str, ...]:
    """The layouts that are run: those that can be expected to give an answer."""
    if architecture.vllm_error is not None or not architecture.is_pooled:
        return ("none",)
    ships = architecture.ships and not architecture.has_experts
    return ("none", "mapped", "streamed", *(["shipped"] if ships else []))


def run(names: Sequence[str], folder: Path, may_end: bool = False) -> dict[str, Seen]:
    """Run architectures one after the other, two ranks at once, in two processes in all.

    In each first turn one rank is plain vLLM, and the other has no pool.
    """
    cases: list[list[dict[str, Any]]] = [[] for _ in range(NUM_RANKS)]
    models = {}
    for name in names:
        architecture = TABLE[name]
        path = architecture.write(folder / name)
        models[name] = read_model(path)
        own = {"engine": dict(architecture.engine), "may_fail": True}
        cases[0].append({"model_dir": str(path), **own})
        for layout in layouts_of(architecture):
            shares = _shares(models[name], layout)
            for rank in range(NUM_RANKS) if layout != "none" else (1,):
                cases[rank].append({**pooled_case(path, shares[rank]), **own})
    results = [iter(found) for found in run_ranks(cases, folder, may_end)]
    seen = {}
    for name in names:
        plain = next(results[0])
        layouts = {
            layout: [next(found) for found in (results if layout != "none" else results[1:])]
            for layout in layouts_of(TABLE[name])
        }
        seen[name] = Seen(_account(models[name], plain.block_tokens), plain, layouts)
    return seen


def _shares(model: ModelFacts, layout: str) -> Sequence[PoolShare]:
    sizes = model.ffn_bytes()
    if layout == "none":
        return plan_shares(sizes, NUM_RANKS, "none")
    if layout != "shipped":
        return plan_shares(sizes, NUM_RANKS, layout)  # type: ignore[arg-type]
    rows = SHIP_ROWS * model.hidden_size * model.dtype_bytes()
    return plan_shares(sizes, NUM_RANKS, "shipped", ship_bytes=rows, ship_below_rows=ALWAYS)


def _account(model: ModelFacts, block_tokens: int) -> MemoryBudget:
    """The account of ``KV_BYTES``, in blocks as large as vLLM's are: of latents, it halves them."""
    budget = divide_memory(model, _shares(model, "none"), 0, MOST_TOKENS, 4)
    return replace(budget, kv_bytes=KV_BYTES, block_tokens=block_tokens or budget.block_tokens)


def difference(found: Result, wanted: Result) -> float:
    """The largest difference of two results' log-probabilities, while their tokens are the same.

    And by how much less likely a token was that one of them took and the other did not. Sampled
    rows are left out.
    """
    largest = 0.0
    for one, other in zip(found.rows, wanted.rows, strict=True):
        for token, step, wanted_token, wanted_step in zip(*one, *other, strict=True):
            gaps = [abs(step[t] - wanted_step[t]) for t in step.keys() & wanted_step.keys()]
            least, wanted_least = min(step.values()), min(wanted_step.values())
            if token != wanted_token:
                gaps.append(step[str(token)] - step.get(str(wanted_token), least))
                gaps.append(
                    wanted_step[str(wanted_token)] - wanted_step.get(str(token), wanted_least)
                )
            if max(step, key=step.__getitem__) == str(token):
                largest = max(largest, *gaps)
            if token != wanted_token:
                break
    return largest


def verdict(found: Result, wanted: Result) -> str:
    """One cell of the table."""
    if found.error is not None:
        return _first_line(found.error)
    if wanted.error is not None:
        return "runs"
    return "equal" if found.rows == wanted.rows else f"within {difference(found, wanted):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[])
    parser.add_argument("--at-once", type=int, default=1, help="models that share two processes")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    names = args.names or list(TABLE)
    print(f"| {' | '.join(_COLUMNS)} |")
    print(f"| {' | '.join('---:' if 'KV' in column else '---' for column in _COLUMNS)} |")
    for begin in range(0, len(names), args.at_once):
        with TemporaryDirectory() as folder:
            some = names[begin : begin + args.at_once]
            for name, seen in run(some, Path(folder), may_end=True).items():
                print(_line(name, seen), flush=True)


def _line(name: str, seen: Seen) -> str:
    cells = [name, _first_line(seen.plain.error) if seen.plain.error else "runs"]
    for layout in _MODES:
        verdicts = {verdict(found, seen.plain) for found in seen.layouts.get(layout, ())}
        cells.append("; ".join(sorted(verdicts)) or "-")
    cells.append(str(seen.plain.num_kv_tokens or "-"))
    cells.append(str(seen.budget.kv_tokens_of(LONGEST)) if seen.budget.kv_is_known else "not known")
    kinds = next((found.pooled for found in seen.layouts.get("mapped", ())), ())
    cells.append(", ".join(f"`{kind}`" for kind in kinds) or "-")
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _first_line(error: str) -> str:
    return " ".join(error.split())[:120]


if __name__ == "__main__":
    main()
