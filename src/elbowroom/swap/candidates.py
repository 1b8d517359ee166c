"""Which saved tensors may leave the device: plain ones that nobody else keeps or refills."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST_BYTES = 1024
"""Storages below this size are kept: to move them costs more than they take."""


class Candidates:
    """Tells storages that may leave from those that must stay.

    Parameters and buffers stay, whatever tensors of their storages are saved, and so do all
    tensors but plain strided ones: sparse ones, conjugates and subclasses have more than a storage,
    those inside of ``torch.func`` none of their own.
    The unsharded parameters of FSDP are views of a Parameter whose storage FSDP empties and
    refills; to swap them gives wrong gradients without any error.

    Args:
        model: the model whose parameters and buffers stay.
        smallest_bytes: storages below this size stay, too.
        plain: the type of plain tensors; another one where a whole step is of stand-ins for them.

    """

    def __init__(
        self,
        model: nn.Module,
        smallest_bytes: int = SMALLEST_BYTES,
        plain: type[torch.Tensor] = torch.Tensor,
    ) -> None:
        self.model = model
        self.smallest_bytes = smallest_bytes
        self._plain = plain
        # Weak references: an identity is not given to another storage as long as they live.
        self._fixed: dict[int, StorageWeakRef] = {}
        self.fix((*model.parameters(), *model.buffers()))

    def fix(self, tensors: Iterable[torch.Tensor]) -> frozenset[int]:
        """Have the storages of more tensors stay. Returns their identities."""
        storages = {storage._cdata: storage for storage in _storages(tensors)}
        for identity in storages.keys() - self._fixed.keys():
            reference = StorageWeakRef(storages[identity])  # type: ignore[no-untyped-call]
            self._fixed[identity] = reference
        return frozenset(storages)

    def storage_of(self, tensor: torch.Tensor) -> torch.UntypedStorage | None:
        """The storage that may leave with this tensor; None if it must stay."""
        base = tensor._base
        if isinstance(tensor, nn.Parameter) or isinstance(base, nn.Parameter):
            self.fix([tensor])
            return None
        is_plain = type(tensor) is self._plain and (base is None or type(base) is self._plain)
        if not is_plain or not is_as_stored(tensor):
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # of torch.func: no memory
            return None
        storage = tensor.untyped_storage()
        is_small = storage.nbytes() < max(1, self.smallest_bytes)
        return None if is_small or storage._cdata in self._fixed else storage


def is_as_stored(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the CPU, and nothing but what its storage and strides say."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)


def _storages(tensors: Iterable[torch.Tensor]) -> Iterable[torch.UntypedStorage]:
    """Storages of tensors; those of a DTensor's own part."""
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor)
        try:
            yield local.untyped_storage()
        except (RuntimeError, NotImplementedError):  # sparse, or a subclass without a storage
            continue
