"""Makes a Linux process with everything installed look like one elsewhere with little.

On PYTHONPATH, it takes away what macOS and Windows have not (``fcntl``, ``sched_getaffinity``,
``/proc`` and ``/sys``), and PyTorch, vLLM and what comes with them.
"""

import builtins
import io
import os
import sys

GONE = ("fcntl", "pwd", "torch", "vllm", "transformers", "safetensors")
for name in GONE:
    sys.modules[name] = None  # an import of it fails
for name in ("sched_getaffinity", "sched_setaffinity", "getuid", "statvfs", "sysconf", "killpg"):
    if hasattr(os, name):
        delattr(os, name)


def hide(function):
    def hidden(path, *args, **kwargs):
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "not on this system", str(path))
        return function(path, *args, **kwargs)

    return hidden


builtins.open = io.open = hide(io.open)
os.stat = hide(os.stat)
