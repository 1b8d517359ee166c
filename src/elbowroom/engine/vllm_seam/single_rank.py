"""Process groups of one rank without a network: vLLM makes a dozen, and each would listen."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch.distributed
from torch._C._distributed_c10d import HashStore
from torch.testing._internal.distributed import fake_pg  # noqa: F401 (registers its backend)

_BACKEND = "fake"  # PyTorch's own: a collective of one rank has nothing to do


def keep_off_network() -> None:
    """From now on, process groups in a world of one rank open no port. Others are as they were.

    Gloo listens on a port of the loopback device for every group, whatever its size. Nor is the
    file needed in which ranks would find each other, and which vLLM leaves behind.
    """
    original_init = torch.distributed.init_process_group
    original_new_group = torch.distributed.new_group

    @wraps(original_init)
    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("world_size") == 1:
            backend = _BACKEND
            kwargs |= {"init_method": None, "store": HashStore()}
        return original_init(backend, *args, **kwargs)

    @wraps(original_new_group)
    def new_group(*args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_world_size() == 1:
            kwargs["backend"] = _BACKEND
        return original_new_group(*args, **kwargs)

    torch.distributed.init_process_group = init_process_group
    torch.distributed.new_group = new_group
