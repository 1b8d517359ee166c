"""What the benchmarks share: the bench model, its requests, runs, and dated results."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tools.make_model import make_model

from elbowroom.core import host
from elbowroom.core.cluster import Cluster, Rate
from elbowroom.core.model import ModelFacts, read_model
from elbowroom.engine.vllm_seam import ENVIRONMENT
from elbowroom.planning.pool.memory import BLOCK_TOKENS, workspace_bytes

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "bench"
RESULTS = ROOT / "bench" / "results"

MAX_MODEL_LEN = 1024
MAX_NUM_SEQS = 64
MAX_NUM_BATCHED_TOKENS = 2048

COMMIT_VARIABLE = "ELBOWROOM_BENCH_COMMIT"


class Timed(NamedTuple):
    """One run of vLLM's own batch runner."""

    start_seconds: float
    run_seconds: float
    output_tokens: int


def bench_model() -> Path:
    """Llama shape, 8 layers, hidden 2048, FFN 5632, 32/8 heads, vocabulary 4096, bf16."""
    path = BUILD / "model"
    if not (path / "config.json").exists():
        make_model(path, "llama", 8, 2048, 5632, 32, 8, 4096)
    return path


def memory_for_rows(
    model: ModelFacts,
    num_rows: int,
    row_tokens: int = 1024,
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
    max_num_seqs: int = MAX_NUM_SEQS,
) -> int:
    """Memory at which a replica with full copies holds ``num_rows`` rows, and vLLM's own block."""
    blocks = num_rows * -(-row_tokens // BLOCK_TOKENS) + 1
    return (
        model.replicated_bytes()
        + sum(model.ffn_bytes())
        + workspace_bytes(model, max_num_batched_tokens, max_num_seqs)
        + blocks * BLOCK_TOKENS * model.kv_bytes_per_token()
    )


def bench_facts() -> ModelFacts:
    return read_model(bench_model())


def write_requests(path: Path, num_rows: int, seed: int = 0) -> Path:
    """Chat requests: prompts of 256-512 tokens, outputs of 384-512, end of text ignored."""
    generator = random.Random(seed)
    lines = []
    for index in range(num_rows):
        prompt = random_prompt(generator, 256, 512)
        lines.append(request_line(index, prompt, generator.randint(384, 512)))
    return write_lines(path, lines)


def random_prompt(generator: random.Random, least: int, most: int) -> str:
    """So many words, each a token of the bench model."""
    num_words = generator.randint(least, most)
    return " ".join(f"w{generator.randrange(2, 4096)}" for _ in range(num_words))


def request_line(index: int, prompt: str, max_tokens: int) -> str:
    """A chat request that gives ``max_tokens`` tokens."""
    body = {
        "model": "bench",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
    }
    line = {"custom_id": f"row-{index}", "method": "POST", "url": "/v1/chat/completions"}
    return json.dumps({**line, "body": body})


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def with_link(cluster: Cluster, bytes_per_second: float) -> Cluster:
    """The machine with another link. While a copy is held back it costs no compute."""
    links = tuple(replace(link, bandwidth=Rate(bytes_per_second)) for link in cluster.links)
    device = replace(cluster.device, copies_overlap=True)
    return replace(cluster, device=device, links=links)


def run_elbowroom(
    requests: Path, pool: str, memory_bytes: int, *options: str, model: Path | None = None
) -> dict[str, Any]:
    """One ``elbowroom run`` with two replicas of the bench model or another. Returns its report."""
    output = BUILD / "elbowroom.jsonl"
    command = [
        *(sys.executable, "-m", "elbowroom", "run", "--model", str(model or bench_model())),
        *("--input", str(requests), "--output", str(output), "--replicas", "2"),
        *("--memory", str(memory_bytes), "--pool", pool, "--served-model-name", "bench"),
        "--restart",
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)),
        *("--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS), *options),
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stderr[-6000:], flush=True)
        done.check_returncode()
    report: dict[str, Any] = json.loads(output.with_suffix(".report.json").read_text())
    return report


def run_plain_vllm(
    requests: list[Path],
    cores: list[list[int]],
    kv_bytes: int,
    *options: str,
    served: str = "bench",
    is_default: bool = False,
) -> Timed:
    """``vllm run-batch``, one engine per requests file, all at once, each on its cores.

    The run counts from when the last engine has started to when the last has ended. ``is_default``
    leaves lengths and batches as vLLM has them.
    """
    if not is_default:
        options += (
            *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)),
            *("--block-size", str(BLOCK_TOKENS)),
            *("--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)),
        )
    options += ("--served-model-name", served)
    outputs = [BUILD / f"plain-{index}.jsonl" for index in range(len(requests))]
    begin = time.monotonic()
    engines = [
        _start_run_batch(file, output, of_engine, kv_bytes, *options)
        for file, output, of_engine in zip(requests, outputs, cores, strict=True)
    ]
    for engine in engines:
        _wait_for_line(engine, "Reading batch from")
    started = time.monotonic()
    for engine, output in zip(engines, outputs, strict=True):
        while engine.poll() is None and not output.exists():
            time.sleep(0.05)
    seconds = time.monotonic() - started
    for engine in engines:
        engine.communicate(timeout=120)
        assert engine.returncode == 0
    bodies = [json.loads(line)["response"]["body"] for out in outputs for line in out.open()]
    tokens = sum(body["usage"]["completion_tokens"] for body in bodies)
    return Timed(started - begin, seconds, tokens)


def _start_run_batch(
    requests: Path, output: Path, cores: list[int], kv_bytes: int, *options: str
) -> subprocess.Popen[str]:
    output.unlink(missing_ok=True)
    command = [
        *("taskset", "-c", ",".join(map(str, cores))),
        *(sys.executable, "-m", "vllm.entrypoints.openai.run_batch"),
        *("-i", str(requests), "-o", str(output), "--model", str(bench_model())),
        *("--kv-cache-memory-bytes", str(kv_bytes), *options),
    ]
    environment = {**ENVIRONMENT, **os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    # What a user of vLLM has: its own choice of processes.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    # One core is enough for it to bind to; by default it keeps one back for its scheduler.
    environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )


def _wait_for_line(engine: subprocess.Popen[str], text: str) -> None:
    assert engine.stdout is not None
    lines = []
    for line in engine.stdout:
        lines.append(line)
        if text in line:
            return
    raise RuntimeError("vllm run-batch ended early:\n" + "".join(lines[-30:]))


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    return {
        "cpu": cpu,
        "has_bf16": host.fastest_dtype("bfloat16") == "bfloat16",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit that is run; where the code was copied without it, what the environment says."""
    if COMMIT_VARIABLE in os.environ:
        return os.environ[COMMIT_VARIABLE]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True).stdout.strip()


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Keep a result with its date, commit and machine, and print it. None is overwritten."""
    today = datetime.date.today().isoformat()
    path = RESULTS / f"{name}-{today}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(2):
        if not path.exists():
            break
        path = RESULTS / f"{name}-{today}-{number}.json"
    about = {"date": today, "commit": commit(), "machine": machine()}
    text = json.dumps({**about, **result}, indent=2)
    path.write_text(text + "\n")
    print(text)
    return path
