"""What answers depend on, and what only lies beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from elbowroom.jobs.identity import job_identity
from elbowroom.plans.pool import EngineOptions
from tests.tiny_model import write_model

Identity = Callable[..., dict[str, str]]


@pytest.fixture
def identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Identity:
    """The identity of a job with options for vLLM; the test's folder is the current one."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")

    def of_options(*options: str, own: tuple[str, ...] = ()) -> dict[str, str]:
        engine = EngineOptions("float32", 64, 4, 64, ("m",), extra=options)
        return job_identity(tmp_path / "model", engine, [tmp_path / name for name in own])

    return of_options


def write(name: str, text: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("folder", ["model", "work"])
def test_files_of_jobs_are_no_part_of_a_folder(identity: Identity, folder: str) -> None:
    write("work/adapter_config.json", "{}")
    options = ("--lora-modules", "a=work")
    own = (f"{folder}/in.json", f"{folder}/out.txt")
    before = identity(*options, own=own)
    for name in (*own, f"{folder}/out.report.json", f"{folder}/other.report.json"):
        write(name, "{}")
    assert identity(*options, own=own) == before
    write(f"{folder}/more.json", "{}")
    assert identity(*options, own=own) != before


def test_words_of_options_are_no_files(identity: Identity) -> None:
    options = ("--runner", "pooling", "--dtype=auto", "--lora-modules", '{"name": "sql"}')
    stores = ("--max-logprobs", "4096", "--download-dir", "./pooling")
    before = identity(*options, *stores)
    for name in ("pooling", "auto", "sql", "4096"):
        write(f"{name}/config.json", "{}")
    assert identity(*options, *stores) == before


@pytest.mark.parametrize("name", ["plain", "with space", "a,b", "a:b", "a=b", "x{y}"])
@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.pt", "1_Pooling/config.json"])
def test_what_options_name_is_found_whatever_it_is_called(
    identity: Identity, name: str, file: str
) -> None:
    adapter = json.dumps({"name": "x", "path": name})
    for options in (
        ("--lora-modules", f"x={name}"),
        ("--lora-modules", "y=model", f"x={name}"),
        (f"--lora-modules=x={name}",),
        ("--lora-modules", adapter),
        ("--speculative_config", json.dumps({"model": name})),
        (f"--speculative-config.model={name}",),
        ("--some-option", f"./{name}"),
    ):
        write(f"{name}/{file}", "1")
        before = identity(*options)
        write(f"{name}/{file}", "2")
        assert identity(*options) != before, options


def test_what_a_list_names_is_found(identity: Identity) -> None:
    for options in (("--plugins", "x,a b.py,./c.py"), ("--plugins", '["x", "a b.py", "./c.py"]')):
        for name in ("a b.py", "c.py"):
            write(name, "1")
            before = identity(*options)
            write(name, "2")
            assert identity(*options) != before, name
        Path("a b.py").unlink()
        Path("c.py").unlink()


def test_pooling_is_part_of_a_model(identity: Identity) -> None:
    write("model/1_Pooling/config.json", "1")
    before = identity()
    write("model/1_Pooling/config.json", "2")
    assert identity() != before


@pytest.mark.parametrize(
    "text", ["=" * 5000, "[" * 5000, "a" * 5000, "\0", "\ud800", "{% x %}" * 999]
)
def test_any_text_is_taken(identity: Identity, text: str) -> None:
    assert identity("--chat-template", text)["files that vLLM options name"] == "none"
