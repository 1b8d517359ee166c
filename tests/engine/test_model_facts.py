"""Facts of models, compared with what Transformers and vLLM make of the same configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tools.make_model_defaults import FILE, model_defaults
from transformers import AutoConfig
from vllm.config.model import _get_and_verify_dtype, _get_and_verify_max_len
from vllm.transformers_utils.config import get_config
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from elbowroom.core.model_config import read_config, resolve_dtype
from tests.planning.facts import CONFIGS


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_config_says_what_vllm_reads(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "config.json")
    ours = read_config(tmp_path)
    theirs = get_config(str(tmp_path), trust_remote_code=False)
    text = theirs.get_text_config()
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(theirs.model_type, ModelArchConfigConvertorBase)
    arch = convertor(theirs, text).convert()
    multi_query = ours.model_type == "gpt_bigcode"  # vLLM's convertor leaves that to the model
    assert ours.num_layers == arch.total_num_hidden_layers
    assert ours.num_heads == arch.total_num_attention_heads
    assert ours.num_kv_heads == arch.total_num_kv_heads or multi_query
    assert (ours.latent_size or ours.head_dim) == arch.head_size
    assert ours.hidden_size == arch.hidden_size
    assert ours.vocab_size == arch.vocab_size
    assert ours.num_experts == arch.num_experts
    assert ours.experts_per_token == arch.num_experts_per_token
    longest = _get_and_verify_max_len(text, arch, None, None, False, None)
    assert ours.max_model_len == longest
    for is_pooling in (False, True):
        dtype = _get_and_verify_dtype(str(tmp_path), theirs, "auto", is_pooling_model=is_pooling)
        assert f"torch.{resolve_dtype(ours, 'float32', 'auto', is_pooling)}" == str(dtype)
    kinds = getattr(text, "layer_types", None)
    if kinds:
        sizes = {
            "sliding_attention": getattr(text, "sliding_window", None) or 0,
            "chunked_attention": getattr(text, "attention_chunk_size", None) or 0,
        }
        windows = [sizes.get(kind, 0) for kind in kinds]
        assert ours.windows == tuple(windows)


def test_defaults_are_those_of_the_config_classes() -> None:
    assert json.loads(FILE.read_text()) == model_defaults(), (
        "run python -m tools.make_model_defaults"
    )


def test_config_is_read_whole(tmp_path: Path) -> None:
    """A config that Transformers writes with all its keys is read like one that has few."""
    for name in ("gemma-3-27b-it", "deepseek-v3", "gpt2-xl"):
        shutil.copy(CONFIGS / f"{name}.json", tmp_path / "config.json")
        few = read_config(tmp_path)
        AutoConfig.from_pretrained(str(tmp_path)).save_pretrained(tmp_path)
        whole = read_config(tmp_path)
        assert (whole.attention, whole.max_model_len) == (few.attention, few.max_model_len)
        assert whole.pair_flops == few.pair_flops
