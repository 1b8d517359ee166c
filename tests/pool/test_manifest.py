"""Layouts of buffers and their seals: shared memory, odd strides, and one bit that differs."""

from __future__ import annotations

import random

import pytest
import torch

from elbowroom.pool.digest import digest
from elbowroom.pool.manifest import ALIGN_BYTES, NamedTensor, lay_out, region_bytes


def _named(**tensors: torch.Tensor) -> list[NamedTensor]:
    return [NamedTensor(name, tensor) for name, tensor in tensors.items()]


def _moved(tensors: list[NamedTensor]) -> tuple[torch.Tensor, list[NamedTensor]]:
    """A buffer with the bytes of all regions, and the tensors in it."""
    manifest = lay_out(tensors)
    buffer = torch.full((manifest.num_bytes,), 0xAA, dtype=torch.uint8)
    for region, data in zip(manifest.regions, region_bytes(tensors, manifest), strict=True):
        region.of(buffer).copy_(data)
    return buffer, _named(**{place.name: place.view(buffer) for place in manifest.places})


def test_tensors_of_any_form_come_out_as_they_were() -> None:
    """Transposed, padded, shifted, of several types, and two that share memory."""
    joined = torch.randn(40, 24)
    wide = torch.randn(16, 40).to(torch.bfloat16)
    tensors = _named(
        plain=torch.randn(3, 5),
        transposed=torch.randn(8, 6).t(),
        first=joined[:20],
        second=joined[20:],
        all=joined,
        padded=wide[:, :33],
        words=torch.randint(0, 2**31, (7,), dtype=torch.int32),
        bytes=torch.randint(0, 255, (9, 3), dtype=torch.uint8),
        eighths=torch.randn(6, 4).to(torch.float8_e4m3fn),
    )
    manifest = lay_out(tensors)
    buffer, moved = _moved(tensors)
    for (name, before), (_, after) in zip(tensors, moved, strict=True):
        assert before.stride() == after.stride()
        values = [tensor.contiguous().view(torch.uint8) for tensor in (before, after)]
        assert torch.equal(*values), name
        assert after.untyped_storage().data_ptr() == buffer.data_ptr(), "a copy, not a view"
    assert all(place.offset_bytes % place.dtype.itemsize == 0 for place in manifest.places)
    assert all(region.offset_bytes % ALIGN_BYTES == 0 for region in manifest.regions)
    assert len(manifest.regions) == len(tensors) - 2, "joined memory is there once"
    assert manifest.seal_of(moved) == manifest.seal_of(tensors)


def test_regions_do_not_overlap() -> None:
    sizes = [random.Random(0).randrange(1, 3000) for _ in range(20)]
    tensors = _named(**{f"t{n}": torch.randn(size) for n, size in enumerate(sizes)})
    regions = lay_out(tensors).regions
    ends = [region.offset_bytes + region.num_bytes for region in regions]
    assert all(end <= after.offset_bytes for end, after in zip(ends, regions[1:], strict=False))


@pytest.mark.parametrize("num_bytes", [1, 8, 1000, 32768, 100_003])
def test_a_seal_tells_any_bit(num_bytes: int) -> None:
    data = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8)
    manifest, before = lay_out(_named(w=data)), lay_out(_named(w=data)).seal_of(_named(w=data))
    for bit in {0, 7, num_bytes * 4, num_bytes * 8 - 1}:
        data[bit // 8] ^= 1 << bit % 8
        after = manifest.seal_of(_named(w=data))
        assert manifest.difference(before, after) == "the bytes of w"
        data[bit // 8] ^= 1 << bit % 8
    assert manifest.difference(before, manifest.seal_of(_named(w=data))) is None


def test_a_digest_tells_the_order_of_parts() -> None:
    data = torch.randint(0, 255, (3 * 32768,), dtype=torch.uint8)
    for first, second, size in ((0, 32768, 32768), (8, 16, 8), (0, 65536, 4096), (5, 9, 1)):
        swapped = data.clone()
        swapped[first : first + size] = data[second : second + size]
        swapped[second : second + size] = data[first : first + size]
        assert not torch.equal(swapped, data)
        assert digest(swapped) != digest(data)
    assert digest(data[:-1]) != digest(data)


def test_a_seal_tells_shapes_and_names_what_differs() -> None:
    one, other = torch.randn(8, 4), torch.randn(8, 4)
    tensors = _named(one=one, other=other)
    manifest, seal = lay_out(tensors), lay_out(tensors).seal_of(tensors)
    turned = _named(one=one.view(4, 8), other=other)
    difference = manifest.difference(seal, lay_out(turned).seal_of(turned))
    assert difference is not None
    assert "shapes" in difference
    other[3, 3] += 1
    assert manifest.difference(seal, manifest.seal_of(tensors)) == "the bytes of other"


def test_a_buffer_ends_with_its_seal() -> None:
    tensors = _named(w=torch.randn(30, 7))
    manifest = lay_out(tensors)
    buffer = torch.zeros(manifest.num_bytes + 100, dtype=torch.uint8)
    seal = manifest.seal_of(tensors)
    manifest.write_seal(buffer, seal)
    assert manifest.read_seal(buffer) == seal
    assert not buffer[: manifest.data_bytes].any()
    assert not buffer[manifest.num_bytes :].any()
