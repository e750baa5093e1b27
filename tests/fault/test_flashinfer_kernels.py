"""flashinfer's kernels are built without a GPU, found where an image puts them, and missed with a sentence.

The kernel that is built here is a real one, by the real compiler, from the packages that scripts/setup installs: about
a minute on two cores. FLASHINFER_CUDA_ARCH_LIST, flashinfer's own variable, stands in for the GPU that would tell the
architecture. Each case is a process of its own, since flashinfer reads its environment once.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from toka_engine.errors import ExitCode
from toka_engine.model.cuda.flashinfer_modules import BUILT_HEAD_DIMS, Kind, list_kinds
from toka_engine.model.cuda.toolchain import choose_num_jobs

from tests.fault.image import ROOT, copy_stage, run

pytestmark = pytest.mark.timeout(900)
FA2 = ("--kinds", "fa2", "--head-dims", "64")

LOAD = """
import sys
from toka_engine.errors import TokaError
from toka_engine.model.cuda.flashinfer_modules import Kind, load_modules
kind = Kind(sys.argv[1])
try:
    print("loaded", callable(load_modules([kind], int(sys.argv[2]))[kind].paged_run))
except TokaError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def build(
    out_dir: Path, *arguments: str, source: Path = ROOT / "engine", **env: str
) -> subprocess.CompletedProcess[str]:
    return run("-m", "toka_engine.model.aot", str(out_dir), *arguments, source=source, **env)


def load(kind: Kind, head_dim: int, **env: str | Path) -> subprocess.CompletedProcess[str]:
    return run("-c", LOAD, kind, str(head_dim), FLASHINFER_CUDA_ARCH_LIST="9.0a", **env)


def architectures_in(library: bytes) -> Iterator[int]:
    """The architecture of the first device code in each fat binary: a header of 16 bytes, then an entry that names it
    at byte 28."""
    for begin in re.finditer(re.escape(b"\x50\xed\x55\xba\x01\x00\x10\x00"), library):
        (architecture,) = struct.unpack_from("<I", library, begin.start() + 16 + 28)
        yield architecture


@pytest.fixture
def without_compiler(tmp_path: Path) -> dict[str, Path]:
    """An environment where no program can be found, and where nothing can be written at home."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    return {"PATH": tmp_path / "empty", "CUDA_HOME": tmp_path / "empty", "HOME": tmp_path / "file"}


@pytest.fixture(scope="module")
def image_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree that the Dockerfile's stage of these kernels sees."""
    root = tmp_path_factory.mktemp("image")
    copy_stage("engine-kernels", root)
    return root


@pytest.fixture(scope="module")
def built(image_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one kernel, built as the image builds the whole table."""
    out_dir = tmp_path_factory.mktemp("kernels")
    done = build(out_dir, *FA2, source=image_source)
    assert done.returncode == 0, done.stderr
    assert "1/1 fa2 head_dim=64 architecture=9.0a: building" in done.stderr
    return out_dir


def test_a_kernel_is_built_for_the_architecture_without_a_gpu(built: Path) -> None:
    (library,) = (path for path in built.rglob("*") if path.is_file())
    assert library.suffix == ".so"
    assert library.parts[-4:-2] == ("90a", "cached_ops")
    assert set(architectures_in(library.read_bytes())) == {90}
    assert list(built.iterdir()) == [library.parents[3]]


def test_what_is_built_is_not_built_again(built: Path) -> None:
    (library,) = built.rglob("*.so")
    before = library.stat()
    done = build(built, *FA2)
    assert done.returncode == 0, done.stderr
    assert "there already" in done.stderr
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_built_kernel_is_loaded_with_no_compiler_no_ninja_and_no_home_to_write_to(
    built: Path, without_compiler: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    done = load(Kind.FA2, 64, TOKA_KERNELS_DIR=built, TMPDIR=tmp_path / "tmp", **without_compiler)
    assert done.stdout == "loaded True\n", done.stderr
    assert not list((tmp_path / "tmp").iterdir())


def test_flashinfers_own_cache_is_loaded_as_it_is_where_no_compiler_is(
    built: Path, without_compiler: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(built, tmp_path / "home/.cache/flashinfer")
    done = load(Kind.FA2, 64, **{**without_compiler, "HOME": tmp_path / "home"})
    assert done.stdout == "loaded True\n", done.stderr


def test_a_kernel_that_is_neither_built_nor_to_be_compiled_is_named(
    built: Path, without_compiler: dict[str, Path]
) -> None:
    done = load(Kind.FA2, 256, TOKA_KERNELS_DIR=built, **without_compiler)
    (words,) = done.stderr.splitlines()
    assert done.returncode == ExitCode.DEVICE_UNAVAILABLE
    assert "batch_prefill" in words
    assert "head_dim_qk_256" in words
    assert f"90a is not built in TOKA_KERNELS_DIR={built}" in words
    assert "no nvcc" in words


@pytest.mark.parametrize("env", [{}, {"TOKA_KERNELS_DIR": "/nowhere"}])
def test_a_cache_that_cannot_be_written_is_named_where_a_kernel_would_go_there(
    tmp_path: Path, env: dict[str, str]
) -> None:
    (tmp_path / "file").touch()
    done = load(Kind.FA2, 64, FLASHINFER_WORKSPACE_BASE=tmp_path / "file", **env)
    (words,) = done.stderr.splitlines()
    assert done.returncode == ExitCode.STORAGE_FAILED
    assert words == f"the kernel cache {tmp_path}/file/.cache/flashinfer cannot be written: Not a directory"


def test_a_library_that_cannot_be_loaded_is_named(
    built: Path, without_compiler: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(built, tmp_path / "copy")
    (library,) = (tmp_path / "copy").rglob("*.so")
    library.write_bytes(b"of another machine")
    done = load(Kind.FA2, 64, TOKA_KERNELS_DIR=tmp_path / "copy", **without_compiler)
    assert done.returncode == ExitCode.DEVICE_UNAVAILABLE
    assert library.name in done.stderr.splitlines()[-1]


def test_a_gpu_without_flashinfer_says_which_image_has_it(tmp_path: Path) -> None:
    blocker = "import sys; sys.modules['flashinfer'] = None\n"
    done = run("-c", blocker + LOAD, Kind.FA2, "64", HOME=tmp_path)
    assert done.returncode == ExitCode.DEVICE_UNAVAILABLE
    assert "EXTRAS=gpu" in done.stderr


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'release 13.0,'\necho 'prefill.cu(7): error: no room' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart.so.13").touch()
    done = build(tmp_path / "out", *FA2, CUDA_HOME=str(tmp_path))
    assert done.returncode == ExitCode.DEVICE_UNAVAILABLE
    assert done.stderr.endswith("kernel fa2 for head size 64: prefill.cu(7): error: no room\n")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "env", "code", "words"),
    [
        (("--architectures", "hopper"), {}, ExitCode.CONFIG_INVALID, "--architectures hopper"),
        ((), {"CUDA_HOME": "/nowhere"}, ExitCode.DEVICE_UNAVAILABLE, "no nvcc, CUDA's compiler in CUDA_HOME=/nowhere"),
        ((), {"CXX": "c++17"}, ExitCode.DEVICE_UNAVAILABLE, "no c++17"),
    ],
)
def test_what_the_build_lacks_is_named(
    tmp_path: Path, arguments: tuple[str, ...], env: dict[str, str], code: ExitCode, words: str
) -> None:
    done = build(tmp_path / "out", *arguments, **env)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert words in line


def test_a_folder_that_cannot_be_written_is_named_by_the_build(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = build(tmp_path / "file" / "out")
    assert done.returncode == ExitCode.STORAGE_FAILED
    assert done.stderr.endswith(f"the folder {tmp_path}/file/out cannot be written: Not a directory\n")


def test_an_architecture_that_fails_ends_the_build_of_several(tmp_path: Path) -> None:
    done = build(tmp_path / "out", "--architectures", "8.0", "9.0a", CUDA_HOME="/nowhere")
    assert done.returncode == ExitCode.DEVICE_UNAVAILABLE
    assert len(done.stderr.splitlines()) == 1


def test_only_hopper_has_a_kernel_of_its_own() -> None:
    assert list_kinds(9) == (Kind.FA2, Kind.FA3)
    assert list_kinds(8) == list_kinds(10) == (Kind.FA2,)
    assert BUILT_HEAD_DIMS == (64, 128)


@pytest.mark.parametrize(("num_cpus", "gigabytes", "jobs"), [(16, 64, 16), (16, 8, 2), (2, 64, 2), (8, 1, 1)])
def test_as_many_compilations_run_at_once_as_cpus_and_memory_allow(num_cpus: int, gigabytes: int, jobs: int) -> None:
    assert choose_num_jobs(num_cpus, gigabytes << 30) == jobs


def test_the_cpu_engine_installs_neither_flashinfer_nor_a_cuda_compiler() -> None:
    assert {"torch", "triton", "transformers"} <= requirements_of("engine")
    assert "flashinfer-python" in requirements_of("gpu")
    assert "nvidia-cuda-nvcc" in requirements_of("kernels")
    assert not {"flashinfer-python", "nvidia-cuda-nvcc"} & requirements_of("engine")


def requirements_of(extra: str) -> set[str]:
    """Names of the packages that an extra of the project brings, as far as they are installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in project["optional-dependencies"][extra]]
    found: set[str] = set()
    while waiting:
        parent = waiting.pop()
        if parent.name in found or not any(metadata.Distribution.discover(name=parent.name)):
            continue
        found.add(parent.name)
        for child in map(Requirement, metadata.requires(parent.name) or ()):
            extras = parent.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": name}) for name in extras):
                waiting.append(child)
    return found
