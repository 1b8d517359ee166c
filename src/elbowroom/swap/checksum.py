"""A checksum of a storage's bytes, about as fast as memory is read.

It is there to notice copies and computations that went wrong, by chance and not by intent. CRC-32
does the same at a hundredth of the speed, which would be most of what recomputing a storage costs.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

_BLOCK_WORDS = 4096
_ODD = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: its multiples by odd numbers are far apart."""


def checksum(storage: torch.UntypedStorage) -> int:
    """Checksum of all bytes of a storage: 64 bits.

    Words are summed in blocks of 32 KiB, and the sums of blocks with weights by their place: a
    changed bit always changes it, and so do blocks in another order.
    """
    size = storage.nbytes()
    if not size:
        return 0
    memory = memoryview((ctypes.c_ubyte * size).from_address(storage.data_ptr())).cast("B")
    num_words = size // 8
    words = np.frombuffer(memory, dtype=np.uint64, count=num_words)
    whole = num_words // _BLOCK_WORDS * _BLOCK_WORDS
    sums = np.add.reduce(words[:whole].reshape(-1, _BLOCK_WORDS), axis=1)
    last = np.add.reduce(words[whole:])
    tail = int.from_bytes(memory[8 * num_words :], "little")
    weights = np.arange(1, 2 * len(sums) + 1, 2, dtype=np.uint64) * np.uint64(_ODD)
    total = int(np.add.reduce(sums * weights)) + int(last) + tail * _ODD
    return total % 2**64
