"""The packed form of a weight: vLLM's CPU kernel on an ordinary tensor, which can be shared."""

from __future__ import annotations

import torch
from vllm.platforms import current_platform

_TILE = 32  # the kernel works on tiles of 32 x 32
_MAX_COLUMNS = 4096  # with more, a strip of 32 rows of both operands falls out of the L2 cache


def is_packable(shape: torch.Size, dtype: torch.dtype) -> bool:
    """Whether the kernel takes this matrix; in other types it aborts the process."""
    return (
        current_platform.is_cpu()
        and dtype == torch.bfloat16
        and all(size % _TILE == 0 for size in shape)
        and hasattr(torch.ops._C, "weight_packed_linear")
    )


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """The packed form of ``weight`` [out, in], of the same shape: one part after the other."""
    if not is_packable(weight.shape, weight.dtype):
        return weight
    parts = weight.chunk(_num_parts(weight.shape[1]), dim=1)
    packed = [torch.ops._C.convert_weight_packed(part.contiguous()).flatten() for part in parts]
    return torch.cat(packed).view(weight.shape)


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` [..., in] times the transpose of a packed weight [out, in]: [..., out].

    A row comes out the same whatever the batch. The bias is added before the product is rounded. A
    matrix of more than 4,096 columns is summed from parts rounded to bf16, as it is by two
    tensor-parallel ranks.
    """
    rows = x.reshape(-1, x.shape[-1])
    num_parts = _num_parts(rows.shape[1])
    out = torch.empty(rows.shape[0], packed.shape[0], dtype=x.dtype)
    partial = torch.empty_like(out) if num_parts > 1 else out
    added = None if bias is None else bias.float()  # the one type that the kernel takes
    parts = packed.view(num_parts, packed.shape[0], -1)
    for number, (columns, part) in enumerate(zip(rows.chunk(num_parts, 1), parts, strict=True)):
        target = partial if number else out
        torch.ops._C.weight_packed_linear(target, columns, part, None if number else added, True)
        if number:
            out += partial
    return out.view(*x.shape[:-1], packed.shape[0])


def _num_parts(num_columns: int) -> int:
    """Into how many equal parts of whole tiles the columns are cut; 1 if few do not divide them."""
    fewest = -(-num_columns // _MAX_COLUMNS)
    return next((n for n in range(fewest, 2 * fewest + 1) if num_columns % (n * _TILE) == 0), 1)
