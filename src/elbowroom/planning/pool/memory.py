"""Memory budget of one replica: the division of its bytes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.kv_cache import kv_groups
from elbowroom.core.model import ModelFacts
from elbowroom.core.units import format_bytes
from elbowroom.plans.pool import MemoryBudget, PoolShare

BLOCK_TOKENS = 32
"""Tokens of one KV block: small, so that a row wastes little, and what vLLM's CPU kernels want."""

MIN_KV_BLOCKS = 2
"""Least number of KV blocks: vLLM keeps block 0 for itself, one more can hold a token."""


def divide_memory(
    model: ModelFacts,
    shares: Sequence[PoolShare],
    memory_bytes: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    tensor_parallel: int = 1,
    activation_bytes: int | None = None,
    pipeline_parallel: int = 1,
    expert_ranks: int = 1,
) -> MemoryBudget:
    """Memory budget of a device of the replica with the most weights; the rest is KV cache.

    KV = memory - W_rest / t - W_ffn / (t d) - slots * w_layer / t - activation workspace, minus
    what is needed to ship, which counts as slots (SiDP, section 3, with t devices per replica and d
    replicas that share a pool).

    ``activation_bytes`` replaces the workspace of ``workspace_bytes`` where it is known. A stage of
    a pipeline has its part of the layers, and may have embeddings and head besides; of routed
    experts, a replica has one in ``expert_ranks``. Never raises: ``kv_bytes`` may be negative, see
    ``check_fits``.
    """
    stages = pipeline_parallel
    ffn_bytes = [-(-size // stages) for size in model.ffn_bytes_of(expert_ranks)]
    owned = -(-max(_owned_bytes(share, ffn_bytes) for share in shares) // tensor_parallel)
    slots = max(share.num_slots for share in shares) * -(-max(ffn_bytes) // tensor_parallel)
    slots += max(_ship_bytes(model, share, tensor_parallel) for share in shares)
    elsewhere = model.other_bytes() * (stages - 1) // stages
    replicated = -(-(model.replicated_bytes() - elsewhere) // tensor_parallel)
    workspace = activation_bytes
    if workspace is None:
        workspace = workspace_bytes(model, max_num_batched_tokens, max_num_seqs, tensor_parallel)
    return MemoryBudget(
        memory_bytes=memory_bytes,
        replicated_bytes=replicated,
        ffn_bytes=owned,
        slot_bytes=slots,
        workspace_bytes=workspace,
        kv_bytes=memory_bytes - replicated - owned - slots - workspace,
        kv_bytes_per_token=-(-model.kv_bytes_per_token(tensor_parallel) // stages),
        block_tokens=BLOCK_TOKENS,
        kv_group_tokens=kv_groups(model.attention.groups()[1], max_num_batched_tokens).most,
        kv_is_known=model.attention.is_known,
    )


def workspace_bytes(
    model: ModelFacts, max_num_batched_tokens: int, max_num_seqs: int, tensor_parallel: int = 1
) -> int:
    """Bytes of the largest iteration's activations: layer inputs, the widest layer, the logits.

    Derived from the tensors that are alive at once in a decoder layer's feed-forward part, which is
    its widest.
    """
    hidden = 3 * model.hidden_size  # layer input, residual, output
    widest = 3 * model.intermediate_size // tensor_parallel  # gate, up, their product
    tokens = max_num_batched_tokens * (hidden + widest) * model.dtype_bytes()
    return tokens + logits_bytes(model, max_num_seqs)


def logits_bytes(model: ModelFacts, num_rows: int) -> int:
    """Bytes of the logits of ``num_rows`` rows, in float32, and one copy of them."""
    return 2 * num_rows * model.vocab_size * 4


def longest_row(model: ModelFacts, budget: MemoryBudget) -> int:
    """Tokens of the longest row that the model and the cache can hold; at least 1."""
    room = budget.num_kv_tokens - BLOCK_TOKENS
    return max(1, budget.kv_groups.longest_row(room, BLOCK_TOKENS, model.max_model_len))


def check_fits(budget: MemoryBudget, max_model_len: int) -> None:
    """Raise MemoryPlanError, with the numbers and what to change, if no row can run."""
    row = budget.kv_groups.row_tokens(max_model_len, budget.block_tokens) + budget.block_tokens
    least = max(MIN_KV_BLOCKS * budget.block_tokens, row) * budget.kv_bytes_per_token
    if budget.kv_bytes >= least:
        return
    fixed = budget.memory_bytes - budget.kv_bytes
    raise MemoryPlanError(
        f"one replica needs {format_bytes(fixed)} before its KV cache (weights "
        f"{format_bytes(budget.weight_bytes)}, slots {format_bytes(budget.slot_bytes)}, "
        f"workspace {format_bytes(budget.workspace_bytes)}) and {format_bytes(least)} for one row "
        f"of {max_model_len} tokens; --memory gives {format_bytes(budget.memory_bytes)}. "
        f"Give --memory at least {format_bytes(fixed + least)}, or lower --max-model-len, "
        f"--max-num-batched-tokens or --max-num-seqs, or use more --replicas with a pool"
    )


def _ship_bytes(model: ModelFacts, share: PoolShare, tensor_parallel: int) -> int:
    """Bytes needed to ship: mailboxes for each peer, rows joined from all, and work on them.

    A mailbox holds rows in and out, and counts for the borrower. The owner's work has gate, up and
    their product alive at once in the widest layer.
    """
    peers = share.num_ranks - 1
    rows = peers * share.ship_bytes // (model.hidden_size * model.dtype_bytes())
    widest = 3 * model.intermediate_size // tensor_parallel * model.dtype_bytes()
    return 2 * peers * share.ship_bytes + share.num_ranks * share.ship_bytes + rows * widest


def _owned_bytes(share: PoolShare, ffn_bytes: Sequence[int]) -> int:
    return sum(
        size for owner, size in zip(share.owners, ffn_bytes, strict=True) if owner == share.rank
    )
