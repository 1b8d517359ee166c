"""One rank of a group, run by vLLM alone: answers fixed prompts under one layout after another.

    python -m tests.equivalence.rank CASES.json RESULTS.json

Runs in a process of its own, because a group needs one process per rank.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry
from vllm.model_executor.offloader.base import get_offloader

from elbowroom.engine.vllm_seam import CONFIG_KEY
from elbowroom.plans.pool import NO_OWNER, PoolShare
from elbowroom.pool.stats import PoolStats
from tests.equivalence.ranks import KV_BYTES, LONGEST, MOST_TOKENS
from tests.pool.spoiled import spoil_released_slots

# With a seed, those that vLLM never cuts in two: of others, its CPU engine fails on the first part.
TEMPERATURES = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
PROMPTS = [list(range(5, 5 + length)) for length in (1, 3, 7, 33, 64, 65, 100, 130)]


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Tokens and log-probabilities of every prompt, greedy and sampled; see ``ranks.Result``."""
    llm = LLM(
        case["model_dir"],
        **{
            **{"dtype": "bfloat16", "max_num_batched_tokens": MOST_TOKENS, "block_size": 32},
            "max_num_seqs": 4,
            **case.get("engine", {}),
        },
        enforce_eager=True,
        max_model_len=LONGEST,
        kv_cache_memory_bytes=KV_BYTES,
        seed=0,
        disable_log_stats=True,
        load_format=CONFIG_KEY if "additional_config" in case else "auto",
        additional_config=case.get("additional_config") or {},
    )
    params = [
        SamplingParams(max_tokens=24, ignore_eos=True, logprobs=3, temperature=t, seed=i)
        for i, t in enumerate(TEMPERATURES)
    ]
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ours = (case.get("additional_config") or {}).get(CONFIG_KEY)
    pooled = _pooled_modules(PoolShare.from_json(ours["share"])) if ours else []
    cache = llm.llm_engine.vllm_config.cache_config
    rows = -(-LONGEST // cache.block_size) * cache.block_size
    llm.llm_engine.engine_core.shutdown()
    return {
        "rows": [_row(output) for output in outputs],
        "num_kv_tokens": round((cache.kv_cache_max_concurrency or 0) * rows),
        "block_tokens": cache.block_size,
        "pooled": pooled,
    }


def _pooled_modules(share: PoolShare) -> list[str]:
    """Classes of the modules that the pool holds. Fails if the pool did not do as the case says."""
    offloader = get_offloader()
    pool = offloader.pool
    assert (pool is None) == (share.mode == "none"), "as the case says"
    stats = PoolStats() if pool is None else pool.stats()
    assert (stats.shipped_rows > 0) == (share.ship_bytes > 0), "as the case says"
    borrows = any(owner not in (share.rank, NO_OWNER) for owner in share.owners)
    assert (stats.mapped_bytes > 0) == (borrows and share.mode == "mapped"), "as the case says"
    assert (stats.streamed_bytes > 0) == bool(share.fetches), "as the case says"
    layers = range(offloader.loader.num_layers)
    modules = (module for layer in layers for module in offloader.loader.modules_of(layer))
    return list(dict.fromkeys(type(module).__name__ for module in modules))


def _row(output: RequestOutput) -> list[Any]:
    found = output.outputs[0]
    return [
        list(found.token_ids),
        [{t: p.logprob for t, p in step.items()} for step in found.logprobs or ()],
    ]


def _failed(error: BaseException) -> dict[str, Any]:
    """What a model that vLLM or the pool cannot run is known by: the first error of all."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return {"error": f"{type(error).__name__}: {error}"}


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Answer one case, which may fail if it says so, and leave nothing of it behind.

    It may name a module to ``import`` before vLLM is started.
    """
    if "import" in case:
        import_module(case["import"])
    try:
        return answer(case)
    except Exception as error:
        if not case.get("may_fail"):
            raise
        return _failed(error)
    finally:
        cleanup_dist_env_and_memory()


def _collect(generation: int = 2) -> int:
    """Leave it to Python when to look for garbage."""
    return 0


def _run(function: Callable[[], Any]) -> Any:
    return function()


def main() -> None:
    spoil_released_slots()
    # vLLM asks for it eight times an engine, and each time it takes longer than loading the model.
    gc.collect = _collect
    # Nor is there a GPU here for which to look at a model's class in a process of its own first.
    registry._run_in_subprocess = _run
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = Path(sys.argv[2])
    done: list[dict[str, Any]] = []
    for case in cases:
        done.append(run(case))
        results.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
