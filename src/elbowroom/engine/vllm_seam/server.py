"""Request side: one vLLM engine behind vLLM's own OpenAI application, called in-process."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

import httpx
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.api_server import build_app, init_app_state
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.reader import Counter, Gauge, get_metrics_snapshot

from elbowroom.core import host
from elbowroom.core.errors import InputError
from elbowroom.engine.vllm_seam import CONFIG_KEY
from elbowroom.engine.wire import Stats
from elbowroom.plans.pool import RunPlan
from elbowroom.pool.stats import PoolStats

_WORKER_EXTENSION = "elbowroom.engine.vllm_seam.worker.PoolWorkerExtension"


_LEAST_SHARE = "0.01"
"""Share of a GPU that vLLM wants to find free. The plan says how large the cache is, and several
replicas that load at the same time see each other's memory come and go."""


class Reply(NamedTuple):
    """What vLLM's OpenAI application answered. Only what is JSON has a status of 2xx."""

    status_code: int
    body: Any


_NO_ROUTE = {"detail": "Not Found"}


class Engine:
    """A started engine. ``answer`` may be called any number of times at once."""

    def __init__(self, llm: AsyncLLM, client: httpx.AsyncClient) -> None:
        self._llm = llm
        self._client = client

    @staticmethod
    async def start(plan: RunPlan, replica: int, run_dir: str) -> Engine:
        """Start the engine of one replica. Raises whatever vLLM raises, or InputError for flags."""
        try:
            args = make_arg_parser(FlexibleArgumentParser()).parse_args(
                engine_arguments(plan, replica, run_dir)
            )
        except SystemExit as error:
            raise InputError(f"vLLM refused the options {' '.join(plan.engine.extra)}") from error
        os.environ.setdefault("VLLM_RPC_BASE_PATH", run_dir)  # its sockets are private, too
        if args.tensor_parallel_size > 1:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _cores(args.tensor_parallel_size))
            os.environ["TMPDIR"] = run_dir  # the file in which ranks meet goes with the directory
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        llm = AsyncLLM.from_vllm_config(config)
        tasks = await llm.get_supported_tasks()
        app = build_app(args, tasks, llm.model_config)
        await init_app_state(llm, app.state, args, tasks)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        return Engine(llm, httpx.AsyncClient(transport=transport, base_url="http://replica"))

    async def answer(self, url: str, body: dict[str, Any], request_id: str = "") -> Reply:
        """One request, through the same routes and checks as vLLM's HTTP server.

        vLLM makes the id of its response from ``request_id``. Cancelling aborts the request.
        """
        headers = {"X-Request-Id": request_id} if request_id else None
        response = await self._client.post(url, json=body, headers=headers, timeout=None)
        status = response.status_code
        try:
            body = response.json()
        except ValueError:
            if response.is_success:
                kind = response.headers.get("content-type", "something else")
                message = f"the answer is {kind}, not JSON: ask for 'encoding_format' base64"
                return _error(501, "NotImplementedError", message)
            return _error(status, "InternalServerError", response.text or response.reason_phrase)
        if status == 404 and body == _NO_ROUTE:
            message = (
                f"this engine has no {url}: embeddings, scores and ranks need -- --runner pooling, "
                f"and chats and completions an engine without it"
            )
            return _error(status, "NotFoundError", message)
        return Reply(status, body)

    async def num_prompt_tokens(self, body: dict[str, Any]) -> int:
        """Tokens of a chat or completion prompt, as vLLM counts them; 0 where it cannot tell."""
        keys = ("model", "messages", "prompt", "tools", "chat_template_kwargs")
        asked = {key: body[key] for key in keys if key in body}
        status, reply = await self.answer("/tokenize", asked)
        return int(reply["count"]) if status == 200 else 0

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV cache holds of the longest rows, as vLLM counts them, whole blocks."""
        config = self._llm.vllm_config
        block = int(config.cache_config.block_size)
        row = -(-int(config.model_config.max_model_len) // block) * block
        return round((config.cache_config.kv_cache_max_concurrency or 0) * row)

    async def stats(self) -> Stats:
        """Values of vLLM's own metrics, and the pool counters of the replica's first device.

        Its other devices do the same beside it.
        """
        pool: dict[str, Any] = (await self._llm.collective_rpc("elbowroom_stats"))[0]
        values: dict[str, float] = {}
        for metric in get_metrics_snapshot():
            if isinstance(metric, Counter | Gauge):
                values[metric.name] = values.get(metric.name, 0) + metric.value
        return Stats(
            num_requests_running=int(values.get("vllm:num_requests_running", 0)),
            num_requests_waiting=int(values.get("vllm:num_requests_waiting", 0)),
            kv_cache_usage=values.get("vllm:kv_cache_usage_perc", 0.0),
            prompt_tokens=int(values.get("vllm:prompt_tokens", 0)),
            generation_tokens=int(values.get("vllm:generation_tokens", 0)),
            num_preemptions=int(values.get("vllm:num_preemptions", 0)),
            prefix_query_tokens=int(values.get("vllm:prefix_cache_queries", 0)),
            prefix_hit_tokens=int(values.get("vllm:prefix_cache_hits", 0)),
            pool=PoolStats(**pool),
        )

    async def resident_bytes(self) -> int:
        """Memory that loading took on a device, measured; see ``PoolWorkerExtension``."""
        return int(max(await self._llm.collective_rpc("elbowroom_resident_bytes")))

    async def check_health(self) -> None:
        """Raises when the engine core is gone."""
        await self._llm.check_health()

    async def close(self) -> None:
        await self._client.aclose()
        self._llm.shutdown()


def _error(status: int, kind: str, message: str) -> Reply:
    """A failure in the form of OpenAI's error bodies."""
    error = {"message": message[:1000], "type": kind, "param": None, "code": status}
    return Reply(status, {"error": error})


def _cores(num_ranks: int) -> str:
    """The replica's cores, divided among its tensor-parallel ranks; with too few, shared."""
    cores = host.cores()
    of_ranks = (
        cores[tp_rank::num_ranks] or [cores[tp_rank % len(cores)]] for tp_rank in range(num_ranks)
    )
    return "|".join(",".join(map(str, of_rank)) for of_rank in of_ranks)


def engine_arguments(plan: RunPlan, replica: int, run_dir: str) -> list[str]:
    """VLLM's command line for one replica of the plan."""
    engine, share = plan.engine, plan.shares[replica]
    pool = {CONFIG_KEY: {"share": share.to_json(), "run_dir": run_dir}}
    # Without a pool, vLLM keeps all to itself on GPUs: there are no kernels of ours.
    is_ours = bool(share.owners) and not (share.mode == "none" and current_platform.is_cuda())
    width = plan.layout.tensor_parallel if plan.layout else 1
    arguments = [
        *("--model", plan.model_dir),
        *("--served-model-name", *engine.served_model_names),
        *("--dtype", engine.dtype),
        *("--seed", str(engine.seed)),
        *("--max-model-len", str(engine.max_model_len)),
        *("--max-num-seqs", str(engine.max_num_seqs)),
        *("--max-num-batched-tokens", str(engine.max_num_batched_tokens)),
        *("--block-size", str(plan.budget.block_tokens)),
        *("--kv-cache-memory-bytes", str(plan.budget.kv_bytes)),
        *(("--gpu-memory-utilization", _LEAST_SHARE) if current_platform.is_cuda() else ()),
        *("--tensor-parallel-size", str(width)),
        *("--distributed-executor-backend", "uni" if width == 1 else "mp"),
        *("--worker-extension-cls", _WORKER_EXTENSION),
        *(("--load-format", CONFIG_KEY) if is_ours else ()),
        *(("--additional-config", json.dumps(pool)) if is_ours else ()),
        # By default it is a hash over all settings, which differ from replica to replica.
        *("--fingerprint-mode", "custom", "--fingerprint-value", f"vllm-{vllm.__version__}"),
        "--enable-prefix-caching" if engine.prefix_caching else "--no-enable-prefix-caching",
        *(("--kv-cache-dtype", engine.kv_dtype) if engine.kv_dtype else ()),
        "--disable-uvicorn-access-log",
        "--enforce-eager",  # a compiled engine would start half a minute later
    ]
    return arguments + list(engine.extra)
