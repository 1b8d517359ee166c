"""One rank of a group, run by vLLM alone: answers fixed prompts under one layout after another.

    python -m tests.equivalence.rank CASES.json RESULTS.json

Runs in a process of its own, because a group needs one process per rank.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor.offloader.base import get_offloader

from elbowroom.core.errors import UnsupportedModelError
from elbowroom.engine.vllm_seam import CONFIG_KEY
from elbowroom.plans.pool import PoolShare
from elbowroom.pool.stats import PoolStats
from tests.pool.spoiled import spoil_released_slots

PROMPTS = [list(range(5, 5 + length)) for length in (1, 3, 7, 33, 64, 65, 100, 130)]


def answer(case: dict[str, Any]) -> list[Any]:
    """Tokens and log-probabilities of every prompt, greedy and sampled, as plain JSON values.

    A case may name a module to ``import`` before vLLM is started. Where it says ``is_refused``, the
    text of the error is returned.
    """
    if "import" in case:
        import_module(case["import"])
    if not case.get("is_refused"):
        return _answer(case)
    try:
        _answer(case)
    except UnsupportedModelError as error:
        return [str(error)]
    raise AssertionError("the model was not refused")


def _answer(case: dict[str, Any]) -> list[Any]:
    llm = LLM(
        case["model_dir"],
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        block_size=32,
        kv_cache_memory_bytes=4 << 20,
        seed=0,
        disable_log_stats=True,
        load_format=CONFIG_KEY if "additional_config" in case else "auto",
        additional_config=case.get("additional_config") or {},
    )
    params = [
        SamplingParams(max_tokens=24, ignore_eos=True, logprobs=3, temperature=t, seed=i)
        for i, t in enumerate([0.0, 1.0] * (len(PROMPTS) // 2))
    ]
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    if "additional_config" in case:
        pool = get_offloader().pool
        share = PoolShare.from_json(case["additional_config"][CONFIG_KEY]["share"])
        stats = PoolStats() if pool is None else pool.stats()
        assert (pool is None) == (share.mode == "none"), "as the case says"
        assert (stats.shipped_rows > 0) == (share.ship_bytes > 0), "as the case says"
        borrows = any(owner != share.rank for owner in share.owners)
        assert (stats.mapped_bytes > 0) == (borrows and share.mode == "mapped"), "as the case says"
        assert (stats.streamed_bytes > 0) == bool(share.fetches), "as the case says"
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return [
        [
            list(output.outputs[0].token_ids),
            [{t: p.logprob for t, p in step.items()} for step in output.outputs[0].logprobs],
        ]
        for output in outputs
    ]


def main() -> None:
    spoil_released_slots()
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(case) for case in cases]))


if __name__ == "__main__":
    main()
