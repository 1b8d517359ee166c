"""A layer in a pool: the modules whose tensors the pool holds, bound to memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from elbowroom.core.errors import PoolError
from elbowroom.pool.find import find_modules
from elbowroom.pool.manifest import Manifest, NamedTensor, Region, lay_out, region_bytes

Forward = Callable[..., torch.Tensor]
"""A feed-forward module's ``forward``: rows [..., columns] to rows [..., columns]."""

_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Attribute names of what chooses experts and weighs them: small, and joined by engines as they
like, so every replica keeps its own."""

SMALL_BYTES = 4096
"""Tensors of fewer bytes stay with every replica."""


class PooledLayer:
    """The modules of one layer that the pool holds, in the order in which they run.

    Their tensors are all registered parameters and buffers but small ones and those of routers,
    whatever an engine made of them when they were loaded. ``forwards`` are the modules' own, as
    they were at first.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = tuple(modules.values())
        self.forwards: tuple[Forward, ...] = tuple(module.forward for module in self.modules)
        self._names = tuple(modules)
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """Where the tensors lie in the layer's buffer, once they are final (``settle``)."""
        assert self._manifest is not None, "the layer is loaded before its manifest is asked for"
        return self._manifest

    @property
    def num_bytes(self) -> int:
        """Bytes of the layer's buffer."""
        return self.manifest.num_bytes

    def tensors(self) -> list[NamedTensor]:
        """What the modules have now. An engine may replace some while it loads them."""
        seen: set[int] = set()
        found = []
        for name, module in zip(self._names, self.modules, strict=True):
            for path, part in without_routers(module, name):
                own = (*part._parameters.items(), *part._buffers.items())
                for leaf, tensor in own:
                    if tensor is None or tensor.nbytes < SMALL_BYTES or id(tensor) in seen:
                        continue
                    seen.add(id(tensor))
                    found.append(NamedTensor(f"{path}.{leaf}", tensor))
        return found

    @property
    def data_bytes(self) -> int:
        """Bytes that the tensors need in one buffer, as they are now."""
        return lay_out(self.tensors()).data_bytes

    def give_up(self, buffer: torch.Tensor) -> None:
        """Have the tensors lie in ``buffer`` (uint8, at least ``data_bytes``), without values."""
        tensors = self.tensors()
        _bind(tensors, lay_out(tensors), buffer)

    def settle(self) -> tuple[int, ...]:
        """Fix what the layer holds, now that it is loaded and processed. Returns its seal."""
        tensors = self.tensors()
        self._manifest = lay_out(tensors)
        return self._manifest.seal_of(tensors)

    def move_to(self, buffer: torch.Tensor) -> None:
        """Have the tensors lie in ``buffer`` (uint8, ``num_bytes``), with their values."""
        for region, data in self._regions():
            region.of(buffer).copy_(data)
        self.bind(buffer)

    def bind(self, buffer: torch.Tensor) -> None:
        """Have the modules compute with what lies in ``buffer``, uint8, from here on."""
        _bind(self.tensors(), self.manifest, buffer)

    @contextmanager
    def bound_to(self, buffer: torch.Tensor) -> Iterator[None]:
        """Have the modules compute with what lies in ``buffer`` for a while."""
        tensors = self.tensors()
        before = [tensor.data for _, tensor in tensors]
        self.bind(buffer)
        try:
            yield
        finally:
            for (_, tensor), data in zip(tensors, before, strict=True):
                tensor.data = data

    def fill_from(self, buffer: torch.Tensor) -> None:
        """Copy what lies in ``buffer`` to where the tensors lie now."""
        for region, data in self._regions():
            data.copy_(region.of(buffer))

    def seal(self) -> tuple[int, ...]:
        """The seal of what the modules compute with now."""
        return self.manifest.seal_of(self.tensors())

    def check_seal(self, expected: tuple[int, ...], what: str) -> None:
        """Raise PoolError if the modules compute with other bytes than ``expected`` stands for."""
        difference = self.manifest.difference(self.seal(), expected)
        if difference is not None:
            raise PoolError(
                f"{what} differs from what it should be in {difference}: the memory or the copy is "
                f"at fault; use --pool none"
            )

    def _regions(self) -> Iterator[tuple[Region, torch.Tensor]]:
        """Each region of the manifest, and the memory where the tensors have it now."""
        memory = region_bytes(self.tensors(), self.manifest)
        return zip(self.manifest.regions, memory, strict=True)


def pooled_layer(block: nn.Module) -> PooledLayer | None:
    """The part of a decoder layer that a pool holds. None for a layer that has no such part."""
    modules = find_modules(block)
    return PooledLayer(modules) if modules else None


def _bind(tensors: list[NamedTensor], manifest: Manifest, buffer: torch.Tensor) -> None:
    for (_, tensor), place in zip(tensors, manifest.places, strict=True):
        tensor.data = place.view(buffer)


def without_routers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules in ``module`` and their paths, itself included and each once, but for routers."""
    seen: set[nn.Module] = set()
    found = [(path, module)]
    while found:
        path, part = found.pop(0)
        if part in seen:
            continue
        seen.add(part)
        yield path, part
        children = [(name, child) for name, child in part.named_children() if name not in _ROUTERS]
        found[:0] = [(f"{path}.{name}", child) for name, child in children]
