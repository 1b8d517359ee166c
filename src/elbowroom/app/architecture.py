"""The tensors of an architecture, where a model folder has a config and no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from elbowroom.core.errors import InputError
from elbowroom.core.model_shapes import Stored


def built_tensors(model_dir: Path) -> Mapping[str, Stored]:
    """Tensors of the class that Transformers makes of a config, built without memory for them.

    Runs no code of the folder. Raises InputError without Transformers, and for configs that it
    does not know.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    except ImportError as error:
        raise InputError(
            f"{model_dir} has no weights, and to know its tensors needs transformers: pip install "
            f"'elbowroom[cpu]'"
        ) from error
    try:
        config = AutoConfig.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # its tensors are counted from the plain ones
        is_part = config.get_text_config() is not config
        kind = AutoModelForImageTextToText if is_part else AutoModelForCausalLM
        with torch.device("meta"):
            model = kind.from_config(config)
    except Exception as error:  # whatever the library raises for what it cannot build
        raise InputError(
            f"{model_dir} has no weights, and transformers cannot build its architecture: {error}"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    return {name: Stored(shape, None) for name, shape in shapes.items()}
