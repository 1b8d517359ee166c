"""Writes ``core/model_defaults.json``: what Transformers' config classes take for granted.

Types that vLLM has no class for are marked: it runs them with its Transformers backend. Needs vLLM.
Run it when Transformers or vLLM is upgraded; a test says when it is due.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "src" / "elbowroom" / "core" / "model_defaults.json"

_KEYS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "multi_query",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "attention_chunk_size",
    "no_rope_layer_interval",
)
_EXPERTS = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"),
}
_STATES = ("layers_block_type", "block_types", "mamba_d_state", "ssm_state_size", "global_head_dim")
_ATTENTION = {"full_attention", "sliding_attention"}
_GIVEN = ("hidden_size", "num_attention_heads")
"""Varied below, and never computed from others."""


def model_defaults() -> dict[str, dict[str, Any]]:
    """Values of every config class of a model that generates text, by its model type."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto
    from vllm import ModelRegistry

    classes = {
        **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    native = {
        name
        for name, model in ModelRegistry.models.items()
        if not model.class_name.startswith("Transformers")
    }
    found: dict[str, dict[str, Any]] = {}
    for model_type in sorted(classes.keys() & {*CONFIG_MAPPING}):
        # A class may want parts that are not there, or vary from layer to layer.
        with contextlib.suppress(Exception):
            config = CONFIG_MAPPING[model_type]()
            values = _values(config.get_text_config()) | _pattern(config.get_text_config())
            if classes[model_type] not in native:
                values["is_native"] = False
            found[model_type] = values
            found.setdefault(str(config.get_text_config().model_type), values)
    return dict(sorted(found.items()))


def _values(config: Any) -> dict[str, Any]:
    """Values that the class does not compute from others: those of a wider model are the same."""
    wider = type(config)(
        hidden_size=4 * config.hidden_size, num_attention_heads=2 * config.num_attention_heads
    )
    values = {key: getattr(config, key, None) for key in _KEYS}
    for key, names in _EXPERTS.items():
        found = (getattr(config, name, None) for name in names)
        values[key] = next((value for value in found if type(value) is int), None)
    return {
        key: max(value) if isinstance(value, list) else value
        for key, value in values.items()
        if value is not None and (key in (*_GIVEN, *_EXPERTS) or getattr(wider, key, None) == value)
    }


def _pattern(config: Any) -> dict[str, Any]:
    """After how many layers one attends to all tokens; or that layers differ in other ways."""
    kinds = getattr(config, "layer_types", None) or []
    if any(getattr(config, key, None) for key in _STATES) or not {*kinds} <= _ATTENTION:
        return {"is_regular": False}
    if not {*kinds} > {"full_attention"}:
        return {}
    for every in range(1, len(kinds) + 1):
        pattern = [(layer + 1) % every == 0 for layer in range(len(kinds))]
        if pattern == [kind == "full_attention" for kind in kinds]:
            return {"full_every": every}
    return {"is_regular": False}


def main() -> None:
    """Write the file, one line for each model type."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in model_defaults().items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
