"""Models by name: from a cache as the hub's library lays it out; nothing is downloaded here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from elbowroom.app import hub
from elbowroom.app.hub import complete, find_model
from elbowroom.core.errors import InputError
from elbowroom.core.model import read_model
from tests.tiny_model import write_model

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds org/tiny at two commits, of which ``main`` is one."""
    repository = tmp_path / "models--org--tiny"
    for commit in (COMMIT, OLDER):
        write_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots"


def test_a_model_in_the_cache(cache: Path) -> None:
    found = find_model("org/tiny")
    assert found == cache / COMMIT
    assert read_model(found).name == "org/tiny", "the name that rows may use"
    assert find_model("org/tiny", OLDER) == cache / OLDER


def test_a_folder_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_model(tmp_path / "org" / "tiny")
    assert find_model("org/tiny").resolve() == folder
    assert find_model(str(folder)) == folder
    with pytest.raises(InputError, match="--revision is for models of the hub"):
        find_model("org/tiny", "main")


@pytest.mark.parametrize("name", ["nope", "/no/such/folder", "a/b/c", "", "org/na me"])
def test_what_is_no_name(cache: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"is not a directory|is a folder"):
        read_model(find_model(name or "./missing"))


@pytest.mark.parametrize("name", ["a/b--c", "a/b..c", "a/b.git"])
def test_what_the_hub_takes_for_no_name(cache: Path, name: str) -> None:
    with pytest.raises(InputError, match="no name on the hub"):
        find_model(name)


def test_a_plan_finds_the_weights_that_it_lacked(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``plan`` needs no weights; ``run --plan`` fetches them into the same folder."""
    assert complete(cache / COMMIT) == cache / COMMIT
    (cache / COMMIT / "model.safetensors").unlink()
    asked: list[tuple[str, str | None]] = []

    def find(name: str, revision: str | None = None) -> Path:
        asked.append((name, revision))
        return cache / COMMIT

    monkeypatch.setattr(hub, "find_model", find)
    complete(cache / COMMIT)
    assert asked == [("org/tiny", COMMIT)]
    assert complete(cache.parent) == cache.parent, "what is not of the hub stays as it is"


@pytest.mark.parametrize("revision", [None, "v1"])
def test_what_is_not_there_offline(cache: Path, revision: str | None) -> None:
    with pytest.raises(InputError, match="unset HF_HUB_OFFLINE to download it"):
        find_model("org/other", revision)


def test_what_is_missing_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that the cache lacks are fetched, and those alone that a run needs."""
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        asked.append({"name": name, **options})
        return str(cache / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert find_model("org/new", "v2") == cache / COMMIT
    assert (asked[0]["name"], asked[0]["revision"]) == ("org/new", "v2")
    assert "*.safetensors" in asked[0]["allow_patterns"]
    find_model("org/new", with_weights=False)
    assert "*.safetensors" not in asked[1]["allow_patterns"]


def test_a_hub_that_says_no(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str, **options: Any) -> str:
        raise (
            LocalEntryNotFoundError("not here")
            if "local_files_only" in options
            else OSError("401 Unauthorized\nand more lines")
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"cannot be had from the hub: 401 Unauthorized$"):
        find_model("org/secret")
