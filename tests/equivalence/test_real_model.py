"""SmolLM2-135M-Instruct, real weights that nobody here made: a pool answers as plain vLLM does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tools.make_smollm2 import NotAvailableError, make_smollm2
from vllm.platforms import current_platform

from elbowroom.engine.vllm_seam.packed import is_packable
from tests.equivalence.batch_runs import choices, run_elbowroom, run_vllm, write_chats

SECONDS = 900  # of one run, on a machine that does other things too

pytestmark = [pytest.mark.vllm, pytest.mark.nightly, pytest.mark.timeout(3 * SECONDS)]

NAME = "smollm2"
TASKS = (
    "Explain {} in one sentence.",
    "Write a short poem about {}.",
    "What are three facts about {}? Answer as a list.",
    "Is {} older than 100 years? Say why.",
    "Ask me two questions about {}.",
    "Tell a child what {} is.",
    "Translate into French: I have read a book about {}.",
)
TOPICS = (
    *("photosynthesis", "the French Revolution", "a hash table", "inflation"),
    *("black holes", "sourdough bread", "the number 1,729"),
)
GREEDY = {"temperature": 0}
CAPITAL = "What is the capital of France?"

COMMON = ("--served-model-name", NAME, "--max-model-len", "512")
# Batches must be the same for the last bit: attention's projections are oneDNN's, which rounds by
# the number of rows.
ONE_ROW = (*COMMON, "--max-num-seqs", "1", "--max-num-batched-tokens", "512")
# Enough tokens for the prompts of 16 rows: vLLM on a CPU fails where it cuts one that has a seed.
MANY_ROWS = (*COMMON, "--max-num-seqs", "16", "--max-num-batched-tokens", "2048")
NO_PREFIXES = "--no-enable-prefix-caching"
CACHE = ("--kv-cache-memory-bytes", str(64 << 20))
PACKED = ("--worker-extension-cls", "tests.equivalence.packed_kernel.PackedFeedForward")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    try:
        made = make_smollm2(tmp_path_factory.mktemp("real") / NAME)
    except NotAvailableError as error:
        pytest.skip(str(error))
    yield made
    shutil.rmtree(made)  # pytest keeps the folders of three runs, and this one has 269 MB


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 rows: every other one greedy, the others with a seed of their own."""
    contents = [CAPITAL, *(task.format(topic) for task, topic in product(TASKS, TOPICS))]
    bodies = []
    for index, content in enumerate(contents):
        body = {"model": NAME, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": 24, "logprobs": True, "top_logprobs": 3}
        bodies.append(body | ({"temperature": 0.8, "seed": index} if index % 2 else GREEDY))
    assert len(bodies) == 50
    return write_chats(tmp_path_factory.mktemp("requests") / "requests.jsonl", bodies)


@pytest.fixture(scope="module")
def plain_bits(
    model: Path, requests: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What vLLM answers in bfloat16, row by row, with the kernel that a pool takes."""
    current_platform.import_kernels()
    if not is_packable(torch.Size((32, 32)), torch.bfloat16):
        pytest.skip("vLLM's build for this CPU has no packed kernel")
    output = tmp_path_factory.mktemp("plain") / "bits.jsonl"
    flags = (*ONE_ROW, *CACHE, *PACKED, NO_PREFIXES, "--dtype", "bfloat16")
    run_vllm(model, requests, output, *flags, timeout=SECONDS)
    return choices(output)


@pytest.fixture(scope="module")
def plain(model: Path, requests: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM answers in float32, as it does by itself."""
    output = tmp_path_factory.mktemp("plain") / "plain.jsonl"
    run_vllm(model, requests, output, *MANY_ROWS, *CACHE, "--dtype", "float32", timeout=SECONDS)
    return choices(output)


@pytest.mark.parametrize("pool", ["mapped", "streamed"])
def test_bfloat16_equals_plain_to_the_last_bit(
    pool: str, model: Path, requests: Path, plain_bits: dict[str, Any], tmp_path: Path
) -> None:
    flags = (*ONE_ROW, "--memory", "512MiB", "--dtype", "bfloat16")
    ours = run_pooled(pool, model, requests, tmp_path / "out.jsonl", *flags, "--", NO_PREFIXES)
    assert ours == plain_bits


@pytest.mark.parametrize("pool", ["mapped", "streamed"])
def test_float32_gives_the_tokens_of_plain_vllm(
    pool: str, model: Path, requests: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    """Log-probabilities differ as two kernels round: by up to 0.00004, where this was measured."""
    flags = (*MANY_ROWS, "--memory", "1GiB", "--dtype", "float32")
    ours = run_pooled(pool, model, requests, tmp_path / "out.jsonl", *flags)
    assert ours.keys() == plain.keys()
    largest = 0.0
    for name, choice in ours.items():
        assert tokens(choice) == tokens(plain[name]), name
        pairs = zip(log_probabilities(choice), log_probabilities(plain[name]), strict=True)
        largest = max(largest, *(abs(our - their) for our, their in pairs))
    print(f"{pool}: log-probabilities differ by {largest:.1e} at most")
    assert largest < 3e-4


def test_answers_make_sense(plain: dict[str, Any]) -> None:
    """Guards the comparisons above: the weights are in their places, and rows differ."""
    texts = [choice["message"]["content"] for choice in plain.values()]
    assert "Paris" in texts[0]
    assert len(set(texts)) == len(texts) == 50


def run_pooled(pool: str, model: Path, requests: Path, output: Path, *flags: str) -> dict[str, Any]:
    """The choices of two replicas, which share a pool and are not started again."""
    ours = ("--replicas", "2", "--pool", pool)
    report = run_elbowroom(model, requests, output, *ours, *flags, timeout=SECONDS)
    for replica in report["replicas"]:
        assert replica["num_restarts"] == 0
        assert (replica["pool"]["mapped_bytes"] > 0) == (pool == "mapped")
        assert (replica["pool"]["streamed_bytes"] > 0) == (pool == "streamed")
    return choices(output)


def tokens(choice: dict[str, Any]) -> list[str]:
    return [step["token"] for step in choice["logprobs"]["content"]]


def log_probabilities(choice: dict[str, Any]) -> list[float]:
    return [step["logprob"] for step in choice["logprobs"]["content"]]
