"""Replays of recipes: a saved storage is made again from tensors that are there.

Functions are named as ``torch.overrides`` names them, and only those listed here are called: they
give the same bits whenever they get the same, draw no random numbers and touch nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.overrides import get_overridable_functions, resolve_name

from elbowroom.core.errors import InputError
from elbowroom.core.recipe import Argument, Call, Made, Recipe, Setting, TensorArgument

_MODULES = ("torch", "torch.Tensor", "torch.nn.functional")

_FUNCTIONS = """
    abs add addcdiv addcmul addmm baddbmm bmm ceil clamp clamp_max clamp_min clone contiguous cos
    cosh div einsum erf exp expm1 floor fmod lerp log log10 log1p log2 logaddexp logsumexp matmul
    maximum minimum mm mul neg outer pow reciprocal remainder round rsqrt rsub sign sin sinh sqrt
    square sub tan tanh true_divide where
    bfloat16 double float half to type_as
    amax amin cumprod cumsum max mean min norm prod std sum var
    cat concat expand flatten flip gather hstack index_select masked_fill narrow permute repeat
    repeat_interleave reshape roll select split squeeze stack swapaxes take_along_dim tile transpose
    tril triu unflatten unsqueeze view vstack
    bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding
    linear
    batch_norm group_norm instance_norm layer_norm local_response_norm normalize rms_norm
    celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_softmax logsigmoid
    mish prelu relu relu6 selu sigmoid silu softmax softmin softplus softshrink softsign tanhshrink
    threshold
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d
    max_pool3d
    fold grid_sample interpolate one_hot pad pixel_shuffle pixel_unshuffle unfold upsample
    """
"""Functions that a recipe may call; those that write in place (with "_" at the end), too."""


@cache
def replayable_functions() -> dict[str, Callable[..., Any]]:
    """Functions that a recipe may call, by name."""
    allowed, found = set(_FUNCTIONS.split()), {}
    for functions in get_overridable_functions().values():
        for function in functions:
            name = resolve_name(function)
            module, _, last = (name or "").rpartition(".")
            if module in _MODULES and last.removesuffix("_") in allowed:
                found[name] = function
    return found


class Replay:
    """A recipe ready to run, for one model.

    Args:
        recipe: what to call.
        fixed: the model's parameters and buffers, by qualified name.

    Raises InputError for a function that is not replayed, a tensor that the model lacks, and a call
    that writes into what is not its own.

    """

    def __init__(self, recipe: Recipe, fixed: Mapping[str, torch.Tensor]) -> None:
        functions = replayable_functions()
        for call in recipe.calls:
            if call.function not in functions:
                raise InputError(
                    f"a recipe calls '{call.function}', which is not replayed: profile the step "
                    "and plan it again"
                )
            _check_written(call)
            _check_settings(call.args)
            _check_settings(tuple(call.kwargs.values()))
        for name in recipe.names:
            if name not in fixed:
                raise InputError(
                    f"a recipe reads '{name}', which is no parameter or buffer of the model: the "
                    "plan is of another one"
                )
        self.recipe = recipe
        self._functions = [functions[call.function] for call in recipe.calls]
        self._fixed = {name: fixed[name] for name in recipe.names}
        self._done = _last_reads(recipe)

    def versions(self) -> list[int]:
        """Versions of the parameters and buffers that it reads."""
        return [tensor._version for tensor in self._fixed.values()]

    def changed(self, versions: list[int]) -> str:
        """Name of a parameter or buffer that was written since; empty if none was."""
        now = zip(self._fixed, versions, self.versions(), strict=True)
        return next((name for name, before, after in now if before != after), "")

    def run(self, saved: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Make the storage again: a tensor in it, whose version is 0.

        ``saved`` has, for each source, any tensor of its storage. What is made on the way is held
        until it was read last. Autocast is off, as it was when the calls were recorded.
        """
        made: dict[Made, torch.Tensor] = {}
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for number, call in enumerate(self.recipe.calls):
                result = self._functions[number](
                    *(self._filled(value, made, saved) for value in call.args),
                    **{key: self._filled(value, made, saved) for key, value in call.kwargs.items()},
                )
                outputs = result if isinstance(result, list | tuple) else (result,)
                for each, last in self._done.items():
                    if each.call == number:
                        made[each] = outputs[each.output]
                    if last == number:
                        del made[each]
                del result, outputs
        return made[self.recipe.result].data

    def _filled(
        self,
        value: Argument,
        made: Mapping[Made, torch.Tensor],
        saved: Mapping[int, torch.Tensor],
    ) -> Any:
        """An argument as the function takes it."""
        if isinstance(value, tuple):
            return tuple(self._filled(each, made, saved) for each in value)
        if isinstance(value, Setting):
            return _setting(value)
        if not isinstance(value, TensorArgument):
            return value
        if isinstance(value.source, Made):
            here = made[value.source]
        elif isinstance(value.source, str):
            here = self._fixed[value.source].detach()
        else:
            here = saved[value.source]
        dtype = getattr(torch, value.dtype)
        return viewed(here, dtype, value.shape, value.stride, value.offset)


def fixed_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's plain parameters and buffers by qualified name."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    plain = (torch.Tensor, nn.Parameter)
    return {name: each for name, each in named.items() if type(each) in plain}


def viewed(
    here: torch.Tensor,
    dtype: torch.dtype,
    shape: Iterable[int],
    stride: Iterable[int],
    offset: int,
) -> torch.Tensor:
    """A view of the storage of ``here``, with the same version counter."""
    num_bytes = here.untyped_storage().nbytes()
    size = max(here.dtype.itemsize, dtype.itemsize)
    num_elements = num_bytes // size * size // here.dtype.itemsize
    flat = here.as_strided((num_elements,), (1,), 0)
    typed = flat if flat.dtype == dtype else flat.view(dtype)
    return typed.as_strided(tuple(shape), tuple(stride), offset)


def _last_reads(recipe: Recipe) -> dict[Made, int]:
    """For each storage that is made, the call that reads it last; one more for the result."""
    last: dict[Made, int] = defaultdict(int)
    for number, call in enumerate(recipe.calls):
        for tensor in call.tensors():
            if isinstance(tensor.source, Made):
                last[tensor.source] = number
    last[recipe.result] = len(recipe.calls)
    return dict(last)


def _check_written(call: Call) -> None:
    """Raise InputError for a call that says that it writes into what is not the recipe's own.

    One that does so and does not say it is noticed by versions, after the replay.
    """
    is_in_place = call.function.endswith("_") or call.kwargs.get("inplace") is True
    first = call.args[0] if call.args else None
    is_own = isinstance(first, TensorArgument) and isinstance(first.source, Made)
    if "out" in call.kwargs or (is_in_place and not is_own):
        raise InputError(f"a recipe's '{call.function}' writes into what it may only read")


def _check_settings(arguments: tuple[Argument, ...]) -> None:
    """Raise InputError for a constant that this PyTorch does not have."""
    for argument in arguments:
        if isinstance(argument, tuple):
            _check_settings(argument)
        elif isinstance(argument, Setting):
            _setting(argument)
        elif isinstance(argument, TensorArgument):
            _setting(Setting("dtype", argument.dtype))


def _setting(setting: Setting) -> Any:
    kinds = {"dtype": torch.dtype, "memory_format": torch.memory_format}
    if setting.kind == "device" and setting.name == "cpu":
        return torch.device("cpu")
    found = getattr(torch, setting.name, None)
    if setting.kind not in kinds or not isinstance(found, kinds[setting.kind]):
        raise InputError(f"a recipe has the {setting.kind} '{setting.name}', which is not known")
    return found
