"""What a model's ``config.json`` says, whatever its keys are called.

Read without any library, so that plans need none: the keys of each model type, and the values that
its class takes where a config leaves them out, are in ``model_defaults.json``. A test holds both
equal to Transformers and vLLM 0.32, and what is derived from them equal to vLLM's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from elbowroom.core.errors import InputError
from elbowroom.core.files import read_json
from elbowroom.core.kv_cache import AttentionLayers

_TEXT_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which models of several kinds of input have the config of their language model."""

_SYNONYMS = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": (
        *("n_head_kv", "num_kv_heads", "multi_query_group_num", "num_attention_groups"),
    ),
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "vocab_size": ("padded_vocab_size",),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": (
        *("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
        *("moe_topk", "moe_top_k", "moe_k"),
    ),
}
_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_DEFAULT_LENGTH = 2048  # vLLM's, for a config that names none
_ALREADY_SCALED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of rotary scaling whose configs give the length after scaling."""

_OTHER_KEYS = (
    *("mamba_d_state", "linear_key_head_dim", "attn_layer_indices", "ssm_state_size"),
    *("layers_block_type", "block_types", "num_kv_shared_layers", "global_head_dim"),
)
"""Keys of models with layers that keep a state, share keys and values, or have other heads."""

_LATENT_TYPES = (
    *("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_mtp", "k3_dspark"),
    *("glm5_next", "glm5_next_text", "glm_moe_dsa", "glm4_moe_lite", "glm4_moe_lite_mtp"),
    *("kimi_k2", "pangu_ultra_moe", "pangu_ultra_moe_mtp"),
)
"""Types of which vLLM keeps one latent vector a layer and token (``is_deepseek_mla``)."""

_DTYPES = {
    **{name: name for name in ("bfloat16", "float16", "float32")},
    **{"half": "float16", "float": "float32", "double": "float32", "float64": "float32"},
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "int8", "uint8"), "float32"),
}
"""Dtypes that configs name. What no engine computes in is treated as float32 is."""

_MOST_LAYERS, _MOST_TOKENS = 10_000, 2**31

_NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")  # vLLM: "numerical instability"


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. ``text`` is the part of the config that describes it.

    ``latent_size`` is the number of elements that multi-head latent attention keeps of a token in a
    layer, 0 for other attention. ``windows`` has, for each layer, how many tokens it attends to, 0
    for all; None means that something else is kept, which is not counted here.
    ``max_model_len`` is the most tokens of a row, as vLLM derives it. ``is_part`` says that the
    model has other parts beside this one, ``is_native`` that vLLM has a class of its own for it,
    as for every type that is not known to have none. With ``needs_bfloat16`` vLLM does not
    compute in float16.
    """

    model_type: str
    architectures: tuple[str, ...]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    num_experts: int
    experts_per_token: int
    latent_size: int
    windows: tuple[int, ...] | None
    ties_embeddings: bool
    dtype: str | None
    quantization: Mapping[str, Any] | None
    text: Mapping[str, Any]
    is_part: bool
    is_native: bool
    needs_bfloat16: bool

    @property
    def pair_flops(self) -> int:
        """FLOPs of a layer for one query and one key: two products for every head."""
        if not self.latent_size:
            return 4 * self.num_heads * self.head_dim
        keys = config_int(self.text, "qk_nope_head_dim") + config_int(self.text, "qk_rope_head_dim")
        return 2 * self.num_heads * (keys + config_int(self.text, "v_head_dim"))

    @property
    def latent_flops(self) -> int:
        """FLOPs of a layer for one query and one cached latent vector, all heads; 0 without."""
        if not self.latent_size:
            return 0
        rank = config_int(self.text, "kv_lora_rank")
        return 2 * self.num_heads * (self.latent_size + rank)

    @property
    def attention(self) -> AttentionLayers:
        """What the attention layers keep of each token."""
        kept = self.latent_size or 2 * self.num_kv_heads * self.head_dim
        windows = self.windows if self.windows is not None else (0,) * self.num_layers
        heads = 1 if self.latent_size else self.num_kv_heads
        return AttentionLayers(windows, kept // heads, heads, self.windows is not None)


def read_config(model_dir: Path) -> ModelConfig:
    """Read the config of a model folder. Raises InputError for one that cannot be used."""
    if not model_dir.is_dir():
        raise InputError(f"{model_dir} is not a directory: give --model a Hugging Face folder")
    config = read_json(model_dir / "config.json")
    try:
        return parse_config(config)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{model_dir / 'config.json'} cannot be used: {error}") from error


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read a config. Raises InputError where a number is missing or impossible.

    And whatever Python raises where a value has another type than such values have.
    """
    part = _text_config(config)
    text = _with_defaults(part)
    model_type = str(text.get("model_type", "unknown"))
    num_layers = _num_layers(part, text)
    if num_layers > _MOST_LAYERS:
        raise InputError(f"config.json: {num_layers} layers are more than {_MOST_LAYERS}")
    num_heads = config_int(text, "num_attention_heads")
    hidden_size = config_int(text, "hidden_size")
    latent = int(text.get("kv_lora_rank") or 0) if model_type in _LATENT_TYPES else 0
    return ModelConfig(
        model_type=model_type,
        architectures=tuple(map(str, config.get("architectures") or ())),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(text, num_heads),
        head_dim=config_int(text, "head_dim", hidden_size // num_heads),
        hidden_size=hidden_size,
        intermediate_size=config_int(text, "intermediate_size", 4 * hidden_size),
        vocab_size=config_int(text, "vocab_size"),
        max_model_len=_max_model_len(text),
        num_experts=_count(text, "num_experts"),
        experts_per_token=_count(text, "experts_per_token"),
        latent_size=latent + int(text.get("qk_rope_head_dim") or 0) if latent else 0,
        windows=_windows(text, num_layers),
        ties_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings"))),
        dtype=_dtype(config, text),
        quantization=_quantization(config, text),
        text=text,
        is_part=part is not config,
        is_native=bool(text.get("is_native", True)),
        needs_bfloat16=config.get("model_type") in _NO_FLOAT16,
    )


def _num_layers(part: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    """Layers of a model. A config that names none of them may have a kind for each (Nemotron-H)."""
    kinds = part.get("layers_block_type") or part.get("hybrid_override_pattern")
    is_named = any(part.get(name) is not None for name in _names("num_hidden_layers"))
    return len(kinds) if kinds and not is_named else config_int(text, "num_hidden_layers")


def resolve_dtype(config: ModelConfig, stored: str, asked: str, is_pooling: bool = False) -> str:
    """The dtype that a model is computed in where ``asked`` is "auto", by vLLM's rule; else that.

    ``stored`` is that of the weights, for a config that names none.
    """
    if asked != "auto":
        return asked
    preferred = "float16" if is_pooling and not config.needs_bfloat16 else "bfloat16"
    own = config.dtype or stored
    own = _DTYPES.get(own, own)
    if own == "float16" and config.needs_bfloat16:
        return "bfloat16"
    return preferred if own == "float32" else own


def config_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Read a positive integer, also by its other names. Raises InputError for anything else."""
    value = next((value for value in _found(config, key) if value is not None), default)
    value = max(value, default=0) if isinstance(value, list) and len(value) > 1 else value
    if type(value) is not int or value < 1:
        raise InputError(f"config.json: '{key}' must be a positive integer, not {value!r}")
    return value


def _count(config: Mapping[str, Any], key: str) -> int:
    """A number that may be missing or 0."""
    values = _found(config, key)
    return next((value for value in values if type(value) is int and value > 0), 0)


def _found(config: Mapping[str, Any], key: str) -> Iterator[Any]:
    """What a config has under a key and its other names, None where it has nothing."""
    return (config.get(name) for name in _names(key))


def _names(key: str) -> tuple[str, ...]:
    return (key, *_SYNONYMS.get(key, ()))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model within a config, which is mostly all of it."""
    for key in _TEXT_KEYS:
        part = config.get(key)
        if isinstance(part, dict):
            found = _text_config(part)
            return found if "model_type" in found else {**found, "model_type": _type_of(config)}
    return config


def _type_of(config: Mapping[str, Any]) -> str:
    own = str(config.get("model_type", "unknown"))
    return f"{own}_text" if f"{own}_text" in _defaults() else own


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the values that its class takes where it names none, by any name.

    One that is null is named: there is none.
    """
    known = _defaults().get(str(config.get("model_type")), {})
    names = {key: _names(key) for key in known}
    names["max_position_embeddings"] = _LENGTH_KEYS
    missing = {
        key: value for key, value in known.items() if not any(name in config for name in names[key])
    }
    return {**missing, **config}


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    """Values of each model type's class, by the names used here."""
    text = (resources.files("elbowroom.core") / "model_defaults.json").read_text()
    defaults: dict[str, dict[str, Any]] = json.loads(text)
    return defaults


def _num_kv_heads(text: Mapping[str, Any], num_heads: int) -> int:
    """Heads of keys and values. One for multi-query attention (Falcon-7B, StarCoder)."""
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    of_dbrx = text.get("attn_config")
    if isinstance(of_dbrx, dict) and of_dbrx.get("kv_n_heads"):
        return config_int(of_dbrx, "kv_n_heads")
    return config_int(text, "num_key_value_heads", num_heads)


def _max_model_len(text: Mapping[str, Any]) -> int:
    """The longest row, as vLLM derives it: lengths in the config, times a scaling of positions."""
    lengths = [text[key] for key in _LENGTH_KEYS if type(text.get(key)) is int]
    longest = float(text.get("model_max_length") or min(lengths, default=_DEFAULT_LENGTH))
    scalings = list(_rope_scalings(text))
    if any(_rope_type(scaling) == "longrope" for scaling in scalings):
        longest = float(text.get("original_max_position_embeddings") or longest)
    elif "gemma3" not in str(text.get("model_type")):
        for scaling in scalings:
            if _rope_type(scaling) not in _ALREADY_SCALED and scaling.get("factor"):
                longest *= float(scaling["factor"])
                break
    if not 1 <= longest <= _MOST_TOKENS:
        raise InputError(f"config.json: rows of at most {longest:g} tokens are no rows")
    return int(longest)


def _rope_scalings(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Rotary scalings of the model: one, or one for each kind of layer."""
    for key in ("rope_scaling", "rope_parameters"):
        scaling = text.get(key)
        if isinstance(scaling, dict):
            nested = [part for part in scaling.values() if isinstance(part, dict)]
            yield from nested or [scaling]


def _rope_type(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _windows(text: Mapping[str, Any], num_layers: int) -> tuple[int, ...] | None:
    """The window of each layer; None for a model with other layers than attention."""
    model_type, window = str(text.get("model_type")), text.get("sliding_window")
    window = window if type(window) is int and window > 0 else 0
    of_latents = bool(text.get("kv_lora_rank")) and model_type not in _LATENT_TYPES
    if any(text.get(key) for key in _OTHER_KEYS) or of_latents:
        return None
    if model_type.startswith("llama4"):
        return _chunks(text, num_layers)
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and len(kinds) >= num_layers:
        if not {*kinds} <= {"full_attention", "sliding_attention"}:
            return None
        return tuple(window * (kind == "sliding_attention") for kind in kinds[:num_layers])
    if text.get("is_regular") is False:
        return None
    if not window or text.get("use_sliding_window") is False:
        return (0,) * num_layers
    every = text.get("sliding_window_pattern") or text.get("full_every")
    if every:
        every = len(every) if isinstance(every, str) else int(every)  # "LLLG": local, global
        return tuple(window * bool((layer + 1) % every) for layer in range(num_layers))
    if "max_window_layers" in text:
        return tuple(window * (layer >= text["max_window_layers"]) for layer in range(num_layers))
    return (window,) * num_layers


def _chunks(text: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Windows of Llama 4: layers with rotary embedding attend within chunks, the others to all.

    A token attends to no more than its whole chunk, which is counted as a window of that size.
    """
    size = config_int(text, "attention_chunk_size") if text.get("attention_chunk_size") else 0
    every = config_int(text, "no_rope_layer_interval")
    in_order = [(layer + 1) % every for layer in range(num_layers)]
    is_rotary = text.get("no_rope_layers") or in_order
    return tuple(size * bool(is_rotary[layer]) for layer in range(num_layers))


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> str | None:
    """The dtype that a config names first, in vLLM's order."""
    parts = (config, text, *(config.get(key) for key in ("vision_config", "encoder_config")))
    for part in parts:
        if isinstance(part, dict) and (own := part.get("dtype") or part.get("torch_dtype")):
            return str(own).removeprefix("torch.")
    return None


def _quantization(config: Mapping[str, Any], text: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for part in (config, text):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part.get(key), dict):
                found: Mapping[str, Any] = part[key]
                return found
    return None


def is_known_type(model_type: str) -> bool:
    """Whether Transformers has such a class; otherwise names and shapes tell what is what."""
    return model_type in _defaults()
