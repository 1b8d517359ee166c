"""vLLM told to multiply with its own packed kernel in the feed-forward layers of SmolLM2-135M.

vLLM takes this kernel on CPUs with AMX for matrices up to some size, else oneDNN's. A pool takes it
on every CPU that has it: its weights are ordinary memory, which can be shared. Each rounds in its
own way. ``--worker-extension-cls`` loads this module into vLLM's worker, and none of Elbowroom.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers import utils

GATE_UP = (2 * 1536, 576)
DOWN = (576, 1536)


class PackedFeedForward:
    """A worker extension without methods: what counts is that its module is imported."""


def _is_feed_forward(num_rows: int, num_columns: int, _dtype: torch.dtype) -> bool:
    return (num_rows, num_columns) in (GATE_UP, DOWN)


utils.check_cpu_sgl_kernel = _is_feed_forward
