"""Workers on this machine, a plan for two, and a network as slow as a benchmark wants it.

Network namespaces stand for hosts. A veth pair joins two of them, a bridge more; each end holds
back what it sends with a token bucket (tc-tbf), as a network card of that rate would: processes
wait in the kernel without computing, in both directions at once. Needs root and Debian's iproute2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from bench.common import BUILD
from elbowroom.core.layer_graph_file import read_layer_graph
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.plans.pipeline import Level, PipelineOptions, PipelinePlan

_BURST, _LATENCY = "128kb", "50ms"
_SHORT_BURST = "32kb"
"""Of what small messages are not to pass by: some of a grid's fit in the other."""


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
            _set_up(name, host)
            if bits_per_second is not None:
                _hold_back(name, host.interface, bits_per_second, _BURST)
        yield hosts[0], hosts[1]
    finally:
        _delete(names)


@contextmanager
def bridged_hosts(count: int, bits_per_second: int | None) -> Iterator[tuple[Host, ...]]:
    """Hosts on a switch, which sends and receives at this rate for each; None holds nothing back.

    The switch is a bridge in a namespace of its own. Raises CalledProcessError where the kernel
    refuses.
    """
    switch = f"bench{os.getpid()}-0"
    names = [f"bench{os.getpid()}-{number}" for number in range(1, count + 1)]
    hosts = tuple(
        Host(("ip", "netns", "exec", name), f"10.77.0.{number}", f"veth{number}")
        for number, name in enumerate(names, start=1)
    )
    try:
        for name in (switch, *names):
            _run("ip", "netns", "add", name)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for number, (name, host) in enumerate(zip(names, hosts, strict=True), start=1):
            port, ours = f"port{number}", ("name", host.interface, "netns", name)
            _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", *ours)
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _set_up(name, host)
            if bits_per_second is not None:
                _hold_back(name, host.interface, bits_per_second, _SHORT_BURST)
                _hold_back(switch, port, bits_per_second, _SHORT_BURST)
        yield hosts
    finally:
        _delete((switch, *names))


def run_workers(hosts: Sequence[Host], *command: str, timeout: float = 600) -> dict[str, Any]:
    """A Python module as workers, each on a host and a core; what the last one printed.

    Where there are fewer cores than workers, each has as many as another. Raises SystemExit if one
    fails, TimeoutExpired after ``timeout`` seconds.
    """
    cores = os.cpu_count() or 1
    workers = [
        subprocess.Popen(
            (*host.prefix, "taskset", "-c", str(number % cores), sys.executable, "-m", *command),
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
    said = [worker.communicate(timeout=timeout) for worker in workers]
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


def _set_up(name: str, host: Host) -> None:
    _run("ip", "-n", name, "address", "add", f"{host.address}/24", "dev", host.interface)
    for interface in ("lo", host.interface):
        _run("ip", "-n", name, "link", "set", interface, "up")


def _hold_back(name: str, interface: str, bits_per_second: int, burst: str) -> None:
    bucket = ("rate", f"{bits_per_second}bit", "burst", burst, "latency", _LATENCY)
    _run("tc", "-n", name, "qdisc", "add", "dev", interface, "root", "tbf", *bucket)


def _delete(names: Sequence[str]) -> None:
    for name in names:
        subprocess.run(("ip", "netns", "delete", name), check=False, stderr=subprocess.DEVNULL)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
