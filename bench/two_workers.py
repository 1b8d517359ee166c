"""Two workers on this machine, a plan for them, and a network as slow as a benchmark wants it.

Two network namespaces stand for two hosts. A veth pair joins them, and each end holds back what it
sends with a token bucket (tc-tbf), as a network card of that rate would: processes wait in the
kernel without computing, in both directions at once. Needs root and Debian's iproute2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from bench.common import BUILD
from elbowroom.core.layer_graph_file import read_layer_graph
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.plans.pipeline import Level, PipelineOptions, PipelinePlan

_BURST, _LATENCY = "128kb", "50ms"


class Host(NamedTuple):
    """A namespace: ``prefix`` before a command runs it there."""

    prefix: tuple[str, ...]
    address: str
    interface: str


LOCAL = Host((), "127.0.0.1", "lo")


@contextmanager
def two_hosts(bits_per_second: int | None) -> Iterator[tuple[Host, Host]]:
    """Two hosts, joined at this rate each way; None holds nothing back.

    Raises CalledProcessError where the kernel refuses.
    """
    names = [f"bench{os.getpid()}-{number}" for number in (1, 2)]
    hosts = [
        Host(("ip", "netns", "exec", name), f"10.77.0.{number}", f"veth{number}")
        for number, name in enumerate(names, start=1)
    ]
    pairs = list(zip(names, hosts, strict=True))
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        one, other = (("name", host.interface, "netns", name) for name, host in pairs)
        _run("ip", "link", "add", *one, "type", "veth", "peer", *other)
        for name, host in pairs:
            _run("ip", "-n", name, "address", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _run("ip", "-n", name, "link", "set", interface, "up")
            if bits_per_second is not None:
                bucket = ("rate", f"{bits_per_second}bit", "burst", _BURST, "latency", _LATENCY)
                _run(
                    *("tc", "-n", name, "qdisc", "add", "dev", host.interface, "root", "tbf"),
                    *bucket,
                )
        yield hosts[0], hosts[1]
    finally:
        for name in names:
            subprocess.run(("ip", "netns", "delete", name), check=False, stderr=subprocess.DEVNULL)


def run_workers(hosts: tuple[Host, Host], *command: str) -> dict[str, Any]:
    """A Python module as two workers, each on a host and a core; what the last one printed.

    Raises SystemExit if one fails.
    """
    workers = [
        subprocess.Popen(
            (*host.prefix, "taskset", "-c", str(number), sys.executable, "-m", *command),
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": str(number),
                "WORLD_SIZE": str(len(hosts)),
                "MASTER_ADDR": hosts[0].address,
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": host.interface,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, host in enumerate(hosts)
    ]
    said = [worker.communicate(timeout=600) for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"{' '.join(command)} failed:\n" + "\n".join(text for _, text in said))
    printed: dict[str, Any] = json.loads(said[-1][0])
    return printed


def plan_two_stages(module: ModuleType, bandwidth: float) -> tuple[PipelinePlan, Path]:
    """For a model of ``bench.models``, from a profile taken now; bytes/s."""
    BUILD.mkdir(parents=True, exist_ok=True)
    profile, path = (BUILD / f"{module.__name__}.{kind}.json" for kind in ("profile", "plan"))
    measure = (sys.executable, "-m", "elbowroom", "train", "profile", str(module.__file__))
    command = (*measure, "--out", str(profile), "--threads", "1", "--seconds", "5")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    options = PipelineOptions(sync="allreduce", straight=True)
    plan = plan_on_levels(read_layer_graph(profile), (Level(2, bandwidth),), options)
    path.write_text(json.dumps(plan.to_json()))
    return plan, path


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
