"""Whether a model, or a plan of one, can be run here: asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from elbowroom.app.vllm_options import option_value
from elbowroom.core.errors import (
    InputError,
    MemoryPlanError,
    PoolError,
    UnsupportedModelError,
)
from elbowroom.core.model import ModelFacts
from elbowroom.engine.vllm_seam.quantised import is_known_engine, why_no_kernel, why_not_known
from elbowroom.jobs.identity import engine_version
from elbowroom.planning.pool.layouts import why_not_pooled
from elbowroom.plans.pool import RunPlan
from elbowroom.pool.run_dir import default_root

_QUANTISES = ("--quantization", "-q")
_CHANGES = (*_QUANTISES, "--hf-overrides", "--allow-deprecated-quantization")
"""Options of vLLM by which weights are of another form than the config says."""

_TOKENIZERS = ("*token*", "tekken*", "vocab*", "merges*", "spiece*", "bpe*", "*.model", "*.vocab")
_OTHER_TOKENIZER = ("--tokenizer", "--skip-tokenizer-init", "--config")


def takes_float32(model: ModelFacts, vllm_options: Sequence[str]) -> bool:
    """Whether vLLM can compute a model in float32: not with most kinds of quantised weights."""
    if option_value(vllm_options, *_QUANTISES) is not None:
        return False
    return model.quantised is None or model.quantised.takes_float32


def check_quantised(model: ModelFacts, model_dir: Path, vllm_options: Sequence[str]) -> None:
    """Check that vLLM's engine for CPUs has kernels here for a model's quantised weights.

    What is not known of it is left to it. Raises UnsupportedModelError, with what would run, and
    InputError for a dtype that vLLM does not compute such weights in.
    """
    weights, version = model.quantised, engine_version()
    if weights is None or option_value(vllm_options, *_CHANGES) is not None:
        return
    if model.dtype == "float32" and not weights.takes_float32:
        raise InputError(
            f"--dtype float32: vLLM computes {weights.method} weights in bfloat16 or float16 only"
        )
    if not is_known_engine(version):
        return
    if weights.is_told:
        from elbowroom.engine.vllm_seam.kernels import own_kernels  # needs PyTorch

        kernels = own_kernels()
        why = None if kernels is None else why_no_kernel(weights, kernels)
    else:
        said = why_not_known(model_dir)
        why = said and f"its weights are quantised ({weights.method}), and {version} says: {said}"
    if why is not None:
        raise UnsupportedModelError(f"{model.name} cannot be run here: {why}")


def check_tokenizer(model_dir: Path, vllm_options: Sequence[str]) -> None:
    """Raise InputError for a folder without any file of a tokenizer, unless another is named."""
    is_elsewhere = option_value(vllm_options, *_OTHER_TOKENIZER) is not None
    if not is_elsewhere and not any(any(model_dir.glob(name)) for name in _TOKENIZERS):
        raise InputError(
            f"{model_dir} has no tokenizer: download the whole model, or name one with "
            f"-- --tokenizer FOLDER"
        )


def check_plan(plan: RunPlan, model: ModelFacts) -> None:
    """Check that a plan is one for this model.

    Raises InputError, and UnsupportedModelError where no pool can hold it in the plan's layout.
    """
    num_layers = len(plan.shares[0].owners)
    if num_layers not in (0, model.num_layers):
        raise InputError(
            f"the plan is for {num_layers} layers, and {model.name} has {model.num_layers}: make "
            f"it again with `elbowroom plan --json`"
        )
    why = why_not_pooled(model, plan.layout) if plan.layout else None
    if why is not None:
        raise UnsupportedModelError(
            f"{model.name} cannot be run as {plan.layout}: {why}. Plan again, with another --pool"
        )


def check_room(num_bytes: int) -> None:
    """Raise MemoryPlanError where files in memory for a pool of this size have no place."""
    try:
        default_root(num_bytes)
    except PoolError as error:
        raise MemoryPlanError(str(error)) from error
