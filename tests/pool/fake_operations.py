"""Operations of PyTorch on a ``FakeDevice``: they go to its current stream and run when it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.pool.fake_device import FakeDevice, Work

_aten = torch.ops.aten
_HOST_READS = {_aten.item.default, _aten._local_scalar_dense.default, _aten.equal.default}
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
}


class Issuing(TorchDispatchMode):
    """Send every operation on tensors to the current stream; what the host reads waits for it.

    Outputs exist at once, and are filled when the stream comes to them.
    """

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if self._device.is_running:
            return func(*args, **kwargs)
        stream = self._device.current_stream()
        if func in _HOST_READS:
            stream.synchronize()
            return func(*args, **kwargs)
        aliases = [one.alias_info for one in func._schema.arguments if one.alias_info is not None]
        if func in _ALLOCATIONS or (aliases and not any(one.is_write for one in aliases)):
            return func(*args, **kwargs)  # memory, or a view of it: there is nothing to run
        if func is _aten.copy_.default:
            for run in _torn_copy(args[0], args[1]):
                stream.put(Work(run))
            return args[0]
        if aliases:
            stream.put(Work(lambda: func(*args, **kwargs)))
            return kwargs.get("out", args[0])
        outputs = _outputs(func, args, kwargs)
        stream.put(Work(lambda: _fill(outputs, func(*args, **kwargs))))
        return outputs


def _torn_copy(target: torch.Tensor, source: torch.Tensor) -> list[Callable[[], object]]:
    """Copy the second half, then the first, where the rows of both can be counted."""
    if target.shape != source.shape or not target.dim():
        return [lambda: target.copy_(source)]
    half = target.shape[0] // 2
    return [
        lambda: target[half:].copy_(source[half:]),
        lambda: target[:half].copy_(source[:half]),
    ]


def _outputs(
    func: torch._ops.OpOverload[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Memory for what an operation will give."""
    meta_args, meta_kwargs = tree_map_only(torch.Tensor, lambda one: one.to("meta"), (args, kwargs))
    if "device" in kwargs:
        meta_kwargs["device"] = "meta"
    like = func(*meta_args, **meta_kwargs)
    return tree_map_only(
        torch.Tensor,
        lambda one: torch.empty_strided(one.shape, one.stride(), dtype=one.dtype),
        like,
    )


def _fill(outputs: object, values: object) -> None:
    """Copy the tensors of ``values`` into those of ``outputs``, which has the same form."""
    if isinstance(outputs, torch.Tensor):
        assert isinstance(values, torch.Tensor)
        outputs.copy_(values)
    elif isinstance(outputs, (tuple, list)):
        assert isinstance(values, (tuple, list))
        for output, value in zip(outputs, values, strict=True):
            _fill(output, value)
