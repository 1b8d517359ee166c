"""Makes a model directory with random weights and a word-level tokenizer, for tests and benchmarks.

    python tools/make_model.py OUT --architecture llama --layers 8 --hidden 2048 --ffn 5632

Words are ``w2`` ``w3`` ...: a prompt of n words is n tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def make_model(
    out: Path,
    architecture: str = "llama",
    num_layers: int = 4,
    hidden_size: int = 128,
    intermediate_size: int = 320,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    vocab_size: int = 256,
    max_positions: int = 2048,
    seed: int | None = None,
) -> Path:
    """Write a Hugging Face model directory in bfloat16; each architecture has its own weights."""
    config = AutoConfig.for_model(
        architecture,
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=vocab_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(ARCHITECTURES.index(architecture) if seed is None else seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    make_tokenizer(vocab_size).save_pretrained(out)
    return out


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    # No special token may begin a word: the tokenizer would split that word in two.
    special = {"<unk>": 0, "<end>": 1}
    words = {f"w{index}": index for index in range(len(special), vocab_size)}
    tokenizer = Tokenizer(WordLevel({**special, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<unk>",
        eos_token="<end>",
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    args = parser.parse_args()
    make_model(
        args.out,
        args.architecture,
        args.layers,
        args.hidden,
        args.ffn,
        args.heads,
        args.kv_heads,
        args.vocab,
    )


if __name__ == "__main__":
    main()
