"""A digest of bytes on any device, about as fast as its memory is read."""

from __future__ import annotations

from hashlib import blake2b

import torch

_ROW_WORDS = 4096
_ODD = 0x9E3779B97F4A7C15 - 2**64
"""2^64 over the golden ratio, as a signed word: its multiples by odd numbers are far apart."""


def digest(data: torch.Tensor) -> int:
    """Digest of ``data`` (uint8, a vector): 63 bits, the same on every device.

    It is there to notice weights that differ by mistake, not by intent. The words of 8 bytes are
    summed by rows of 32 KiB and, apart from that, by columns; each sum has a weight by its place.
    So a changed bit always changes both totals, and parts in another order change one of them.
    """
    num_words = data.numel() // 8
    words = data[: num_words * 8].view(torch.int64)
    whole = num_words // _ROW_WORDS * _ROW_WORDS
    rows = words[:whole].view(-1, _ROW_WORDS)
    parts = [rows.sum(1), rows.sum(0), words[whole:]]
    totals = [int((part * _weights(part)).sum()) if part.numel() else 0 for part in parts]
    rest = bytes(data[num_words * 8 :].tolist())
    text = f"{data.numel()} {totals} ".encode() + rest
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


def _weights(part: torch.Tensor) -> torch.Tensor:
    """Odd numbers, one for each word of ``part``: a product with one loses no bit."""
    return (2 * torch.arange(part.numel(), dtype=torch.int64, device=part.device) + 1) * _ODD
