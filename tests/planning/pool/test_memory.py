"""The memory budget: it adds up, pools help, and a refusal carries the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.kv_cache import AttentionLayers
from elbowroom.core.model import ModelFacts
from elbowroom.core.model_weights import Weights
from elbowroom.core.units import MIB
from elbowroom.planning.pool.memory import check_fits, divide_memory
from elbowroom.planning.pool.shares import plan_shares
from elbowroom.plans.pool import POOL_MODES, MemoryBudget, PoolMode

# The shape of bench's model: 12 layers of 512 x 5376, three matrices each, bfloat16.
LAYER_ELEMENTS = 3 * 512 * 5376
BENCH = ModelFacts(
    name="bench",
    model_type="llama",
    dtype="bfloat16",
    num_layers=12,
    hidden_size=512,
    intermediate_size=5376,
    vocab_size=4096,
    num_heads=8,
    num_kv_heads=4,
    max_model_len=1024,
    attention=AttentionLayers((0,) * 12, 2 * 64, 4),
    ffn=(Weights(LAYER_ELEMENTS),) * 12,
    rest=Weights(10_000_000),
    others=(Weights(),) * 12,
    pair_flops=4 * 64 * 8,
)


def _account(
    mode: PoolMode,
    num_ranks: int = 4,
    memory_bytes: int = 512 * MIB,
    slots: int | None = None,
    model: ModelFacts = BENCH,
) -> MemoryBudget:
    shares = plan_shares(model.ffn_bytes(), num_ranks, mode, slots)
    return divide_memory(model, shares, memory_bytes, max_num_batched_tokens=64, max_num_seqs=16)


def test_by_hand() -> None:
    budget = _account("streamed", slots=2)
    layer = LAYER_ELEMENTS * 2
    assert budget.replicated_bytes == 20_000_000
    assert budget.ffn_bytes == 3 * layer
    assert budget.slot_bytes == 2 * layer
    activations = 64 * (3 * 512 + 3 * 5376) * 2
    logits = 2 * 16 * 4096 * 4
    assert budget.workspace_bytes == activations + logits
    assert budget.kv_bytes_per_token == 2 * 12 * 4 * 64 * 2
    kv_bytes = 512 * MIB - 20_000_000 - 5 * layer - activations - logits
    assert budget.kv_bytes == kv_bytes
    assert budget.num_kv_tokens == kv_bytes // (12_288 * 32) * 32


@given(
    st.sampled_from(POOL_MODES),
    st.integers(1, 6),
    st.integers(0, 2**34),
    st.lists(st.integers(1, 10**7), min_size=1, max_size=9).map(tuple),
)
def test_adds_up_to_the_memory_given(
    mode: PoolMode, num_ranks: int, memory_bytes: int, elements: tuple[int, ...]
) -> None:
    model = replace(BENCH, ffn=tuple(map(Weights, elements)), num_layers=len(elements))
    budget = _account(mode, num_ranks, memory_bytes, model=model)
    parts = budget.weight_bytes + budget.slot_bytes + budget.workspace_bytes + budget.kv_bytes
    assert parts == budget.memory_bytes == memory_bytes
    assert budget.ffn_bytes >= sum(model.ffn_bytes()) / (1 if mode == "none" else num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 12])
def test_a_pool_leaves_more_for_the_cache(num_ranks: int) -> None:
    none, mapped, one_slot = (
        _account("none", num_ranks),
        _account("mapped", num_ranks),
        _account("streamed", num_ranks, slots=1),
    )
    assert none.num_kv_tokens < one_slot.num_kv_tokens < mapped.num_kv_tokens
    saved = sum(BENCH.ffn_bytes()) - 12 // num_ranks * BENCH.ffn_bytes()[0]
    assert mapped.kv_bytes - none.kv_bytes == saved


def test_the_fullest_replica_counts() -> None:
    budget = _account("mapped", num_ranks=5)  # 12 layers: two ranks own three, three own two
    assert budget.ffn_bytes == 3 * BENCH.ffn_bytes()[0]


def test_a_pool_of_one_needs_no_slots() -> None:
    """Nothing is borrowed, so ``Pool`` makes no slots; the memory budget must not count them."""
    assert _account("streamed", num_ranks=1).slot_bytes == 0


def test_check_fits_accepts_what_fits_exactly() -> None:
    budget = _account("mapped")
    row = (-(-1024 // 32) + 1) * 32 * budget.kv_bytes_per_token
    check_fits(replace(budget, kv_bytes=row), 1024)
    with pytest.raises(MemoryPlanError):
        check_fits(replace(budget, kv_bytes=row - 1), 1024)


def test_refusal_carries_the_numbers() -> None:
    budget = _account("none", memory_bytes=100 * MIB)
    assert budget.kv_bytes < 0
    with pytest.raises(MemoryPlanError) as caught:
        check_fits(budget, 1024)
    message = str(caught.value)
    for number in (
        "208.1 MiB",
        "slots 0 B",
        "2.656 MiB",
        "12.38 MiB",
        "1024 tokens",
        "gives 100 MiB",
    ):
        assert number in message, message
    assert "lower --max-model-len" in message


def test_the_memory_that_a_refusal_names_is_enough() -> None:
    budget = _account("none", memory_bytes=100 * MIB)
    fixed = budget.memory_bytes - budget.kv_bytes
    least = (1024 // 32 + 1) * 32 * budget.kv_bytes_per_token
    check_fits(_account("none", memory_bytes=fixed + least), 1024)
