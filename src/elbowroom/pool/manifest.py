"""Where the tensors of a layer lie in one buffer, and the seal by which peers know that they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch

from elbowroom.pool.digest import digest

ALIGN_BYTES = 512
"""What tensors are aligned to in a buffer: as an allocator of device memory does."""


class NamedTensor(NamedTuple):
    """A registered parameter or buffer of a layer's modules."""

    name: str
    tensor: torch.Tensor


class Place(NamedTuple):
    """Where a tensor lies: its first byte in the buffer, and the region that it lies in."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int
    region: int

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor inside ``buffer`` (uint8), without a copy."""
        typed = torch.empty(0, dtype=self.dtype, device=buffer.device)
        first = buffer.storage_offset() + self.offset_bytes
        return typed.set_(
            buffer.untyped_storage(), first // self.dtype.itemsize, self.shape, self.stride
        )


class Region(NamedTuple):
    """Bytes of a buffer that one tensor takes, or several that share memory."""

    offset_bytes: int
    num_bytes: int

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.offset_bytes : self.offset_bytes + self.num_bytes]


@dataclass(frozen=True)
class Manifest:
    """The tensors of a layer in the order in which its modules have them, and their regions.

    A buffer has ``data_bytes`` for them and then its seal: words that tell a reader what was laid
    out how, and what it held when it was published.
    """

    places: tuple[Place, ...]
    regions: tuple[Region, ...]
    data_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole buffer."""
        return self.data_bytes + 8 * (1 + len(self.regions))

    @property
    def layout(self) -> int:
        """A number that stands for all names, shapes, strides, dtypes and offsets: 63 bits."""
        text = repr((self.places, self.regions)).encode()
        return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1

    def seal_of(self, tensors: Sequence[NamedTensor]) -> tuple[int, ...]:
        """The seal of ``tensors`` wherever they lie now: the layout, a digest for each region."""
        return (self.layout, *(digest(data) for data in region_bytes(tensors, self)))

    def read_seal(self, buffer: torch.Tensor) -> tuple[int, ...]:
        """The seal that ``buffer`` ends with."""
        return tuple(buffer[self.data_bytes : self.num_bytes].view(torch.int64).tolist())

    def write_seal(self, buffer: torch.Tensor, seal: Sequence[int]) -> None:
        words = torch.tensor(seal, dtype=torch.int64)
        buffer[self.data_bytes : self.num_bytes].view(torch.int64).copy_(words)

    def difference(self, one: Sequence[int], other: Sequence[int]) -> str | None:
        """What two seals differ in, in words. None where they are equal."""
        if one[0] != other[0]:
            return "the shapes, strides or types of its tensors"
        regions = [n for n, (a, b) in enumerate(zip(one[1:], other[1:], strict=True)) if a != b]
        names = [place.name for place in self.places if place.region in regions]
        return f"the bytes of {', '.join(names)}" if names else None


def lay_out(tensors: Sequence[NamedTensor]) -> Manifest:
    """Give each tensor its place in one buffer. Memory that several share is there once."""
    spans = sorted({_span(tensor) for _, tensor in tensors})
    merged: list[tuple[int, int]] = []
    for begin, end in spans:
        if merged and begin < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    regions: dict[int, Region] = {}  # by address, in the order in which tensors need them
    number: dict[int, int] = {}
    places, offset = [], 0
    for name, tensor in tensors:
        begin, _ = _span(tensor)
        first, last = next(span for span in merged if span[0] <= begin < span[1])
        if first not in regions:
            number[first] = len(regions)
            regions[first] = Region(offset, last - first)
            offset += -(-(last - first) // ALIGN_BYTES) * ALIGN_BYTES
        at = regions[first].offset_bytes + begin - first
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        places.append(Place(name, shape, stride, tensor.dtype, at, number[first]))
    return Manifest(tuple(places), tuple(regions.values()), offset)


def region_bytes(tensors: Sequence[NamedTensor], manifest: Manifest) -> Iterator[torch.Tensor]:
    """The memory (uint8) of each region of ``manifest``, where ``tensors`` have it now."""
    for number, region in enumerate(manifest.regions):
        place, tensor = next(
            (place, tensor)
            for place, (_, tensor) in zip(manifest.places, tensors, strict=True)
            if place.region == number
        )
        storage = tensor.untyped_storage()
        first = tensor.data_ptr() - storage.data_ptr()
        first -= place.offset_bytes - region.offset_bytes
        data = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        yield data.set_(storage, first, (region.num_bytes,), (1,))


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first byte to the one after its last."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()
