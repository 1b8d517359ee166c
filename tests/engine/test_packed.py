"""vLLM's packed CPU kernel, and its parts for wide matrices."""

from __future__ import annotations

import pytest
import torch
from vllm.platforms import current_platform

from elbowroom.engine.vllm_seam.packed import is_packable, pack_weight, packed_linear

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the kernel is for CPU")


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "weight_packed_linear"):
        pytest.skip("vLLM builds this kernel for AVX-512 with bfloat16; else torch's is used")


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("num_columns", [64, 4096, 5632, 4128 * 3, 32 * 131])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product(num_columns: int, num_rows: int, has_bias: bool) -> None:
    weight, x = matrix(96, num_columns), matrix(num_rows, num_columns)
    bias = matrix(96) if has_bias else None
    out = packed_linear(x, pack_weight(weight), bias)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    largest = exact.abs().max() + 1
    num_roundings = -(-num_columns // 4096) + 2
    assert (out.double() - exact).abs().max() < num_roundings * largest * 2**-9


def test_a_bias_is_added_before_the_product_is_rounded() -> None:
    weight, x, bias = matrix(96, 64), matrix(5, 64), matrix(96)
    exact = (x.double() @ weight.double().T + bias.double()).bfloat16()
    rounded = (x.double() @ weight.double().T).bfloat16() + bias
    assert not torch.equal(rounded, exact), "it makes a difference"
    assert torch.equal(packed_linear(x, pack_weight(weight), bias), exact)


def test_a_row_does_not_depend_on_its_batch() -> None:
    packed, x = pack_weight(matrix(96, 5632)), matrix(40, 5632)
    whole = packed_linear(x, packed, None)
    for size in (1, 3, 4, 5, 24):
        assert torch.equal(packed_linear(x[:size], packed, None), whole[:size])


def test_leading_dimensions_are_kept() -> None:
    packed, x = pack_weight(matrix(32, 64)), matrix(6, 64)
    out = packed_linear(x.view(2, 3, 64), packed, None)
    assert torch.equal(out, packed_linear(x, packed, None).view(2, 3, 32))


def test_other_shapes_and_types_stay_as_they_are() -> None:
    assert not is_packable(torch.Size([32, 40]), torch.bfloat16)
    weight = matrix(32, 64).float()
    assert pack_weight(weight) is weight
