"""``--pool none`` runs what vLLM runs, as vLLM runs it, and its cache is as large as planned."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from elbowroom.plans.pool import RunPlan
from tests.equivalence.batch_runs import (
    elbowroom_command,
    run_elbowroom,
    run_vllm,
    settings_of,
    texts,
    write_chats,
)
from tests.equivalence.random_models import edit_config, write_random_model

pytestmark = pytest.mark.vllm

VOCABULARY, LONGEST, NUM_ROWS = 256, 512, 8
LLAMA_LIKE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
GPT_LIKE = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 1024}
OPT_LIKE = {
    "hidden_size": 128,
    "word_embed_proj_dim": 128,
    "ffn_dim": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
OWN_HEADS: dict[str, Any] = {"head_dim": 32}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {**LLAMA_LIKE, **OWN_HEADS, "num_hidden_layers": 6}),
    "gemma2": ("gemma2", {**LLAMA_LIKE, **OWN_HEADS}),
    "falcon": ("falcon", {**LLAMA_LIKE, "multi_query": True, "bias": False}),
    "mixtral": ("mixtral", {**LLAMA_LIKE, "num_local_experts": 4}),
    "gpt2": ("gpt2", GPT_LIKE),
    "opt": ("opt", OPT_LIKE),
    "olmo2": ("olmo2", LLAMA_LIKE),
    "int8": ("llama", LLAMA_LIKE),
    "linear rope": ("llama", {**LLAMA_LIKE, "max_position_embeddings": 128}),
}
FLAGS = (
    *("--max-model-len", str(LONGEST), "--max-num-seqs", "8", "--max-num-batched-tokens", "256"),
    *("--served-model-name", "m"),
)
OURS = (*FLAGS, "--memory", "64MiB", "--dtype", "bfloat16")


@pytest.mark.nightly  # two starts each, of what the matrix has on every push
@pytest.mark.parametrize("kind", KINDS)
def test_pool_none_answers_as_plain_vllm(kind: str, tmp_path: Path) -> None:
    model, requests = _make(tmp_path / "model", kind), _requests(tmp_path / "in.jsonl")
    output, plain = tmp_path / "out.jsonl", tmp_path / "plain.jsonl"
    report = run_elbowroom(model, requests, output, *OURS, "--pool", "none", "--replicas", "1")
    plan = RunPlan.from_json(report["plan"])
    run_vllm(model, requests, plain, *FLAGS, *settings_of(plan))
    ours = texts(output)
    assert ours == texts(plain)
    assert len(set(map(str, ours.values()))) > 1, "not always the same answer"
    planned = plan.budget.kv_tokens_of(plan.engine.max_model_len)
    assert plan.budget.kv_is_known
    assert report["replicas"][0]["num_kv_tokens"] == pytest.approx(planned, rel=0.01)


def test_a_pool_that_gets_no_layers_is_an_error_before_any_row(tmp_path: Path) -> None:
    """Another loader hands over none, whatever the plan believes."""
    model, requests = _make(tmp_path / "model", "int8", quantise=False), tmp_path / "in.jsonl"
    command = elbowroom_command(model, _requests(requests), tmp_path / "out.jsonl", *OURS)
    done = subprocess.run(
        [*command, "--pool", "mapped", "--replicas", "2", "--", "--load-format", "safetensors"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "leave out --load-format" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def _make(folder: Path, kind: str, quantise: bool = True) -> Path:
    """A tiny model whose answers depend on its weights."""
    model_type, keys = KINDS[kind]
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=0, **keys
    )
    if getattr(config, "sliding_window", None):
        config.sliding_window = 64
    write_random_model(folder, config)
    if kind == "int8" and quantise:
        quantise(folder, "int8")
    if kind == "linear rope":
        edit_config(folder, rope_parameters=None, rope_scaling={"type": "linear", "factor": 4.0})
    return folder


def _requests(path: Path) -> Path:
    chance = random.Random(0)
    bodies = []
    for _ in range(NUM_ROWS):
        words = " ".join(f"w{chance.randrange(5, 250)}" for _ in range(chance.randint(5, 200)))
        body = {"model": "m", "messages": [{"role": "user", "content": words}]}
        bodies.append({**body, "max_tokens": 16, "temperature": 0, "ignore_eos": True})
    return write_chats(path, bodies)
