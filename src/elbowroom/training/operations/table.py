"""Table of operations: for each its rule, and how modules, functions, methods and ATen spell it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from elbowroom.training.operations import dense, forms, windows
from elbowroom.training.operations.call import Call, Found

Rule = Callable[[Call], Found]


@dataclass(frozen=True, eq=False)
class Spelling:
    """One way to write an operation.

    Args:
        rule: what describes it.
        names: of its arguments by position; those that ATen calls otherwise are renamed to them.
        more: arguments that this spelling fixes.

    """

    rule: Rule
    names: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


IMAGE_FIRST = (
    *(windows.conv, windows.conv_transpose, windows.max_pool, windows.avg_pool),
    *(windows.adaptive_avg_pool, windows.resize),
    *(dense.batch_norm, dense.group_norm, dense.instance_norm),
)
"""Rules of operations whose input has its features in dimension 1."""

LAST_FIRST = (dense.linear, dense.embedding, dense.layer_norm, dense.attention)
"""Rules of operations whose input has its features in the last dimension."""

_SPACES = (1, 2, 3)
_CONV = "input weight bias stride padding dilation groups"
_TRANSPOSED = "input weight bias stride padding output_padding groups dilation"
_MAX = "input kernel_size stride padding dilation ceil_mode return_indices"
_AVG = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
_NORM = "weight bias running_mean running_var"
_DOTS = "query key value attn_mask dropout_p is_causal scale enable_gqa"
_RESIZE = "input size scale_factor mode align_corners recompute_scale_factor antialias"

RENAMED = {
    "self": "input",
    "indices": "input",
    "output_size": "size",
    "scale_factors": "scale_factor",
    "train": "training",
}
"""Arguments of ATen, and what rules call them; adaptive pools keep their ``output_size``."""

FUNCTIONS: dict[Any, Spelling] = {}
"""Functions of Python."""

METHODS: dict[str, Spelling] = {}
"""Methods of tensors; the first argument is the tensor."""

ATEN: dict[str, Spelling] = {}
"""Operations of ATen by name, whose arguments torch's schemas name."""

MODULES: dict[type[nn.Module], Spelling] = {}
"""Modules, whose attributes of these names are the arguments behind the input."""


def _fill() -> None:
    for n in _SPACES:
        _fill_space(n, {"num_space": n})
    _function("linear", dense.linear, "input weight bias")
    _aten("linear", dense.linear)
    _module(nn.Linear, dense.linear, "weight bias")
    _fill_norms()
    _fill_embedding_and_attention()
    _fill_forms()
    for name in ("dropout", "dropout_"):
        _aten(name, dense.dropout)
    _function("dropout", dense.dropout, "input p training inplace")
    _module(nn.Dropout, dense.dropout, "p training")


def _fill_space(n: int, more: Mapping[str, Any]) -> None:
    spelled: list[tuple[str, Rule, str]] = [
        (f"conv{n}d", windows.conv, _CONV),
        (f"conv_transpose{n}d", windows.conv_transpose, _TRANSPOSED),
        (f"max_pool{n}d", windows.max_pool, _MAX),
        (f"avg_pool{n}d", windows.avg_pool, _AVG),
        (f"adaptive_avg_pool{n}d", windows.adaptive_avg_pool, "input output_size"),
    ]
    for name, rule, names in spelled:
        _function(name, rule, names, more)
        _aten(name, rule, more)
    # What ``boolean_dispatch`` makes is traced as the function that it calls.
    FUNCTIONS[getattr(functional, f"_max_pool{n}d")] = Spelling(
        windows.max_pool, tuple(_MAX.split()), more
    )
    for kind, rule, names in (
        ("Conv", windows.conv, f"{_CONV} padding_mode"),
        ("ConvTranspose", windows.conv_transpose, f"{_TRANSPOSED} padding_mode"),
        ("MaxPool", windows.max_pool, _MAX),
        ("AvgPool", windows.avg_pool, _AVG),
        ("AdaptiveAvgPool", windows.adaptive_avg_pool, "input output_size"),
    ):
        _module(getattr(nn, f"{kind}{n}d"), rule, names.removeprefix("input "), more)
    linear = ("linear", "bilinear", "trilinear")[n - 1]
    for name, mode in (
        (f"upsample_nearest{n}d", "nearest"),
        (f"_upsample_nearest_exact{n}d", "nearest-exact"),
        (f"upsample_{linear}{n}d", "linear"),
    ):
        _aten(name, windows.resize, {**more, "mode": mode})


def _fill_norms() -> None:
    for n in _SPACES:
        batch, instance = (getattr(nn, f"{kind}Norm{n}d") for kind in ("Batch", "Instance"))
        names = f"{_NORM} training momentum eps num_batches_tracked"
        _module(batch, dense.batch_norm, names)
        _module(instance, dense.instance_norm, f"{_NORM} eps", {"num_space": n})
    names = "input running_mean running_var weight bias training momentum eps"
    _function("batch_norm", dense.batch_norm, names, {"training": False})
    _aten("batch_norm", dense.batch_norm)
    _function("group_norm", dense.group_norm, "input num_groups weight bias eps")
    _aten("group_norm", dense.group_norm)
    _module(nn.GroupNorm, dense.group_norm, "num_groups weight bias eps")
    names = "input running_mean running_var weight bias use_input_stats momentum eps"
    _function("instance_norm", dense.instance_norm, names)
    _aten("instance_norm", dense.instance_norm)
    _function("layer_norm", dense.layer_norm, "input normalized_shape weight bias eps")
    _aten("layer_norm", dense.layer_norm)
    _module(nn.LayerNorm, dense.layer_norm, "normalized_shape weight bias eps")


def _fill_embedding_and_attention() -> None:
    names = "weight padding_idx max_norm norm_type scale_grad_by_freq sparse"
    _function("embedding", dense.embedding, f"input {names}")
    _aten("embedding", dense.embedding, {"is_aten": True})
    _module(nn.Embedding, dense.embedding, names.replace("norm_type ", ""))
    names = "num_heads dropout batch_first in_proj_weight in_proj_bias"
    _module(nn.MultiheadAttention, dense.attention, names)
    _function("scaled_dot_product_attention", dense.dot_attention, _DOTS)
    _aten("scaled_dot_product_attention", dense.dot_attention)


def _fill_forms() -> None:
    for name in ("cat", "concat", "concatenate"):
        FUNCTIONS[getattr(torch, name)] = Spelling(forms.cat, ("tensors", "dim"))
        _aten(name, forms.cat)
    FUNCTIONS[torch.mean] = METHODS["mean"] = Spelling(forms.mean, ("input", "dim", "keepdim"))
    _aten("mean", forms.mean)
    for name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"):
        METHODS[name] = Spelling(forms.reshape, ("input",))
        if hasattr(torch, name):
            FUNCTIONS[getattr(torch, name)] = METHODS[name]
        _aten(name, forms.reshape)
    _module(nn.Flatten, forms.reshape, "")
    _module(nn.Unflatten, forms.reshape, "")
    for name in ("transpose", "swapaxes", "swapdims"):
        METHODS[name] = Spelling(forms.transpose, ("input", "dim0", "dim1"))
        FUNCTIONS[getattr(torch, name)] = METHODS[name]
        _aten(name, forms.transpose)
    FUNCTIONS[torch.permute] = METHODS["permute"] = Spelling(forms.permute, ("input", "dims"))
    _aten("permute", forms.permute)
    FUNCTIONS[functional.interpolate] = Spelling(windows.resize, tuple(_RESIZE.split()))
    _module(nn.Upsample, windows.resize, _RESIZE.removeprefix("input ").replace(" antialias", ""))
    FUNCTIONS[operator.getitem] = Spelling(dense.first_of_pair, ("input", "index"))


def _function(name: str, rule: Rule, names: str, more: Mapping[str, Any] | None = None) -> None:
    FUNCTIONS[getattr(functional, name)] = Spelling(rule, tuple(names.split()), more or {})


def _aten(name: str, rule: Rule, more: Mapping[str, Any] | None = None) -> None:
    ATEN[name] = Spelling(rule, (), more or {})


def _module(
    kind: type[nn.Module], rule: Rule, names: str, more: Mapping[str, Any] | None = None
) -> None:
    MODULES[kind] = Spelling(rule, tuple(names.split()), more or {})


_fill()
