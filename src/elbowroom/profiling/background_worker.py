"""One process of ``background_load``: sweeps through the model of a script until it is ended.

    python -m elbowroom.profiling.background_worker SCRIPT SEED THREADS

Prints ``READY`` when it begins. Ends when its standard input does, which its parent holds open.
"""

from __future__ import annotations

import os
import sys
import threading
from math import inf
from pathlib import Path

from elbowroom.profiling.background_load import READY
from elbowroom.profiling.layers import SweepLimits
from elbowroom.profiling.script import load_subject


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    said = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the script prints, nobody reads
    subject = load_subject(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    os.write(said, READY)
    subject.measure(SweepLimits(seconds=inf, most=sys.maxsize))


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
