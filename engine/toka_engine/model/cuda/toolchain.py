"""Finds the CUDA compiler, a system's or that of Python packages, and prepares what a build needs.

The packages (the extra `kernels`) are installed next to torch's CUDA libraries, in site-packages/nvidia/cu13, which has
no lib64 and no libcuda: `prepare_build` makes links for the linker.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from toka_engine.errors import DeviceUnavailableError, StorageError
from toka_engine.model.memory import count_threads, read_limit_bytes

_BYTES_PER_JOB = 4 << 30
"""Memory that one nvcc process may take: 3.3 GB was seen with Hopper's kernel, 0.5 GB with the others."""
_SYSTEM_HOME = Path("/usr/local/cuda")
_HOME_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
_REMEDY = "install the packages of the extra `kernels`, or let CUDA_HOME name a CUDA toolkit"


def find_cuda_home() -> Path | None:
    """Return the folder with bin/nvcc: the one that flashinfer would choose, else that of the packages."""
    return _find_system_home() or _find_packages_home()


def choose_compiler() -> None:
    """Set the variables by which flashinfer sees whether a library is up to date. Raises DeviceUnavailableError."""
    _find_ninja()
    os.environ.setdefault("MAX_JOBS", str(choose_num_jobs(count_threads(), read_limit_bytes())))
    if _find_system_home() is None:
        home = _find_packages_home()
        if home is None:
            raise DeviceUnavailableError(f"no nvcc, CUDA's compiler{_describe_choice()}: {_REMEDY}")
        # Only here: another spelling of a path that flashinfer finds itself would compile everything again.
        os.environ["CUDA_HOME"] = str(home)


def prepare_build(links: Path) -> None:
    """Set the environment in which flashinfer compiles. `links` becomes a folder of libraries to link against.

    Raises DeviceUnavailableError that names the program or library that is missing, StorageError.
    """
    choose_compiler()
    cxx = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(cxx)[0]) is None:
        raise DeviceUnavailableError(f"no {cxx}: compiling kernels takes a C++ compiler (g++)")
    home = _find_system_home()
    if home is not None and not (home / "lib64").exists():
        _make_links(home / "lib", links)
        known = os.environ.get("LIBRARY_PATH", "").split(":")
        os.environ["LIBRARY_PATH"] = ":".join(dict.fromkeys([str(links), *filter(None, known)]))


def choose_num_jobs(num_cpus: int, free_bytes: int) -> int:
    """Return how many compilations run at once."""
    return max(1, min(num_cpus, free_bytes // _BYTES_PER_JOB))


def summarise(output: str) -> str:
    """Return the line of a compiler's output that says what is wrong."""
    lines = output.strip().splitlines() or ["no reason given"]
    return next((line for line in lines if "error:" in line or "fatal" in line), lines[-1])


def _configured_home() -> tuple[str, str] | None:
    """Return the variable that names a toolkit, and its value."""
    return next(((name, value) for name in _HOME_VARIABLES if (value := os.environ.get(name))), None)


def _describe_choice() -> str:
    configured = _configured_home()
    return f" in {configured[0]}={configured[1]}" if configured else ""


def _find_system_home() -> Path | None:
    if configured := _configured_home():
        return _with_nvcc(Path(configured[1]))
    on_path = shutil.which("nvcc")
    return Path(on_path).parents[1] if on_path else _with_nvcc(_SYSTEM_HOME)


def _find_packages_home() -> Path | None:
    if _configured_home():
        return None
    packages = importlib.util.find_spec("nvidia")
    folders = (packages and packages.submodule_search_locations) or ()
    return next((home for folder in folders if (home := _with_nvcc(Path(folder) / "cu13"))), None)


def _with_nvcc(home: Path) -> Path | None:
    return home if (home / "bin" / "nvcc").exists() else None


def _find_ninja() -> None:
    """Put ninja on the PATH: flashinfer runs it by name, and an environment that is not activated lacks it."""
    if shutil.which("ninja"):
        return
    try:
        from ninja import BIN_DIR
    except ModuleNotFoundError as error:
        raise DeviceUnavailableError("no ninja: install the package ninja") from error
    os.environ["PATH"] = f"{BIN_DIR}:{os.environ.get('PATH', os.defpath)}"


def _make_links(libraries: Path, links: Path) -> None:
    runtime = next(iter(sorted(libraries.glob("libcudart.so.*"))), None)
    if runtime is None:
        raise DeviceUnavailableError(f"no libcudart.so in {libraries}: install the package nvidia-cuda-runtime")
    try:
        links.mkdir(parents=True, exist_ok=True)
        target = links / "libcudart.so"
        target.unlink(missing_ok=True)
        target.symlink_to(runtime)
        # The driver's library is the GPU machine's: for the linker an empty one with its name does.
        command = [os.environ.get("CC", "gcc"), "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull]
        subprocess.run([*command, "-o", str(links / "libcuda.so")], check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise StorageError(f"cannot make links to CUDA's libraries in {links}: {error}") from error
