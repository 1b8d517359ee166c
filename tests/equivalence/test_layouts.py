"""Every layout gives the plain result: tokens and log-probabilities, to the last bit."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tools.make_model import ARCHITECTURES, make_model

from elbowroom.core.model import read_model
from elbowroom.planning.pool.shares import SHIP_ROWS, plan_shares
from tests.equivalence.ranks import ffn_bytes, pooled_case, run_ranks

pytestmark = pytest.mark.vllm

NUM_LAYERS = 5  # divisible by neither 2 nor 3


# Mode, slots, fetch order, and the batch below which rows are shipped.
Layout = tuple[str, int | None, str, int]
LAYOUTS: list[Layout] = [
    ("mapped", None, "peak-shift", 0),
    ("streamed", None, "peak-shift", 0),
    ("streamed", 1, "sliced", 0),
    ("shipped", 1, "peak-shift", 10**6),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, name, num_layers=NUM_LAYERS) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``--pool none`` answers, per model: the reference."""
    folder = tmp_path_factory.mktemp("plain")
    cases = [
        pooled_case(path, plan_shares(ffn_bytes(path), 1, "none")[0]) for path in models.values()
    ]
    halves = [cases[::2], cases[1::2]]  # two processes: none of these needs the other
    answers: list[Any] = [None] * len(cases)
    answers[::2], answers[1::2] = run_ranks(halves, folder)
    return dict(zip(models, answers, strict=True))


FIRST, *OTHERS = ARCHITECTURES
EVERY_LAYOUT = [(FIRST, layout) for layout in LAYOUTS]
EVERY_MODEL = [(name, LAYOUTS[-1]) for name in OTHERS]
CROSS = list(product(ARCHITECTURES, LAYOUTS))


@pytest.mark.parametrize(
    ("num_ranks", "pairs"),
    [
        pytest.param(1, EVERY_LAYOUT[1:2], id="1"),
        pytest.param(2, EVERY_LAYOUT + EVERY_MODEL, id="2"),
        pytest.param(3, EVERY_LAYOUT[2:], id="3"),
        *(pytest.param(n, CROSS, id=f"{n}-cross", marks=pytest.mark.nightly) for n in (1, 2, 3)),
    ],
)
def test_pooled_equals_plain(
    models: dict[str, Path],
    plain: dict[str, Any],
    num_ranks: int,
    pairs: list[tuple[str, Layout]],
    tmp_path: Path,
) -> None:
    cases: list[list[dict[str, Any]]] = [[] for _ in range(num_ranks)]
    for name, (mode, slots, order, below) in pairs:
        path = models[name]
        shares = plan_shares(
            ffn_bytes(path),
            num_ranks,
            mode,
            slots,
            order,
            ship_bytes=SHIP_ROWS * read_model(path).hidden_size * 2 if below else 0,
            ship_below_rows=below,
        )
        for rank, share in enumerate(shares):
            cases[rank].append(pooled_case(path, share))
    expected = [plain[name] for name, _ in pairs]
    results = run_ranks(cases, tmp_path)
    assert len(results) == num_ranks
    for rank, answers in enumerate(results):
        for case, answer, wanted in zip(cases[rank], answers, expected, strict=True):
            assert answer.rows == wanted.rows, f"rank {rank} differs from plain: {case}"


def test_reference_is_not_constant(plain: dict[str, Any]) -> None:
    """Guards the comparison above: models differ from each other, and prompts from prompts."""
    answers = [json.dumps(prompt) for model in plain.values() for prompt in model.rows]
    assert len(set(answers)) == len(answers)
