"""Question: how many more tokens a second does a pool give a mixture at equal memory, on two cores?

    python -m bench.mixture [--rounds 3] [--rows 48]

A mixture in Mixtral's form, 8 layers of 8 experts, of which a token takes 2: 0.4 billion weights,
nine tenths of them in experts. Each of two replicas has the memory at which full copies hold 4 rows
of 1,024 tokens. Layouts alternate; ratios are taken within a round. ``streamed`` reads all experts
in every iteration, ``mapped`` those that tokens take.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tools.make_model import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from bench.common import BUILD, memory_for_rows, run_elbowroom, write_requests, write_result
from bench.pool_throughput import LAYOUTS, ratio, summarise
from elbowroom.core.model import read_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=48)
    args = parser.parse_args()
    model = mixture()
    facts = read_model(model)
    memory = memory_for_rows(facts, 4)
    requests = write_requests(BUILD / "requests.jsonl", args.rows)
    run_elbowroom(write_requests(BUILD / "warm-up.jsonl", 4), "mapped", memory, model=model)
    rounds = []
    for number in range(args.rounds):
        reports = {pool: run_elbowroom(requests, pool, memory, model=model) for pool in LAYOUTS}
        rounds.append({pool: summarise(report) for pool, report in reports.items()})
        print(f"round {number}: {rounds[-1]}", flush=True)
    kv = {pool: rounds[0][pool]["kv_tokens"] for pool in LAYOUTS}
    result = {
        "rows": args.rows,
        "weights": sum(facts.ffn_elements) + facts.rest.elements,
        "memory_bytes": memory,
        "kv_tokens": kv,
        "kv_tokens_mapped_over_none": kv["mapped"] / kv["none"],
        "mapped_over_none": ratio(rounds, "mapped", "none"),
        "streamed_over_none": ratio(rounds, "streamed", "none"),
        "rounds": rounds,
    }
    write_result("mixture", result)


def mixture() -> Path:
    """Hidden 1024, 8 experts of 1792, 16/4 heads, vocabulary 4096, bf16."""
    path = BUILD / "mixture"
    if (path / "config.json").exists():
        return path
    config = AutoConfig.for_model(
        "mixtral",
        num_hidden_layers=8,
        hidden_size=1024,
        intermediate_size=1792,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=4096,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    make_tokenizer(4096).save_pretrained(path)
    return path


if __name__ == "__main__":
    main()
