"""Plans: the JSON round trip, and what the memory budget derives."""

from __future__ import annotations

import json

import pytest

from elbowroom.planning.pool.shares import plan_shares
from elbowroom.plans.pool import (
    FETCH_ORDERS,
    POOL_MODES,
    EngineOptions,
    FetchOrder,
    MemoryBudget,
    PoolMode,
    PoolShare,
    RunPlan,
)

BUDGET = MemoryBudget(
    memory_bytes=1000,
    replicated_bytes=100,
    ffn_bytes=200,
    slot_bytes=50,
    workspace_bytes=30,
    kv_bytes=620,
    kv_bytes_per_token=3,
    block_tokens=32,
)
ENGINE = EngineOptions(
    dtype="bfloat16",
    max_model_len=128,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    served_model_names=("a", "b"),
    extra=("--flag", "1"),
)


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("order", FETCH_ORDERS)
def test_plan_survives_json(mode: PoolMode, order: FetchOrder) -> None:
    shares = plan_shares((5_000_000,) * 7, 3, mode, None, order)
    plan = RunPlan("/m", BUDGET, shares, ((0, 1), (2,), ()), ENGINE)
    assert RunPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.num_replicas == 3


def test_share_survives_json() -> None:
    share = plan_shares((10, 20, 30), 2, "streamed")[1]
    text = json.dumps(share.to_json())
    assert '"F0.0/1"' in text, "fetches are written in their text form"
    assert PoolShare.from_json(json.loads(text)) == share


def test_unknown_keys_are_not_swallowed() -> None:
    data = {**plan_shares((10,), 1, "none")[0].to_json(), "slot_colour": "red"}
    with pytest.raises(TypeError, match="slot_colour"):
        PoolShare.from_json(data)


def test_account_counts_whole_blocks() -> None:
    assert BUDGET.weight_bytes == 300
    assert BUDGET.num_kv_blocks == 620 // (3 * 32) == 6
    assert BUDGET.num_kv_tokens == 6 * 32


@pytest.mark.parametrize(
    "change",
    [
        {"kv_group_tokens": []},
        {"kv_group_tokens": ["x"]},
        {"kv_group_tokens": [-5]},
        {"block_tokens": 0},
        {"kv_bytes_per_token": 0},
        {"kv_bytes": "x"},
    ],
)
def test_a_budget_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="its budget has"):
        MemoryBudget.from_json({**vars(BUDGET), **change})
