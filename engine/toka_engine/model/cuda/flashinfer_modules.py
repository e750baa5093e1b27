"""Lists and loads flashinfer's compiled attention modules (0.6.13).

A module is a shared library made for one kernel, head size and architecture. It is looked for in the folder of an image
(TOKA_KERNELS_DIR), which is only read; then in flashinfer's own cache, which is used as it is where there is no
compiler; else it is compiled. Both folders have the form `<flashinfer version>/<architecture>/cached_ops`.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from toka_engine.errors import DeviceUnavailableError, StorageError
from toka_engine.model.cuda import toolchain
from toka_engine.model.folders import check_writable

KERNELS_VARIABLE = "TOKA_KERNELS_DIR"
WORKSPACE_VARIABLE = "FLASHINFER_WORKSPACE_BASE"
"""flashinfer's variable: its cache is `.cache/flashinfer` in that folder, by default in the home folder."""
HEAD_DIMS = (64, 128, 256)
"""Head sizes that the engine runs on a GPU."""
BUILT_HEAD_DIMS = (64, 128)
"""Head sizes whose modules an image holds."""
BUILT_ARCHITECTURES = ("9.0a",)

logger = logging.getLogger("toka.model")


class Kind(StrEnum):
    """The attention kernel of a module."""

    FA2 = "fa2"
    """FlashAttention-2, for every architecture."""
    FA3 = "fa3"
    """FlashAttention-3, for Hopper."""


def list_kinds(major: int) -> tuple[Kind, ...]:
    """Return the modules that the engine loads for a head size on an architecture of this major version."""
    return tuple(Kind) if major == 9 else (Kind.FA2,)


def load_modules(kinds: Iterable[Kind], head_dim: int) -> dict[Kind, Any]:
    """Load flashinfer's modules for the GPU of this machine, in bfloat16.

    Raises DeviceUnavailableError if flashinfer or a kernel is missing and cannot be compiled, StorageError if it would
    have to be compiled and its cache cannot be written.
    """
    with _workspace() as unwritable:
        return {kind: _load(kind, head_dim, unwritable) for kind in kinds}


def generate(kind: Kind, head_dim: int) -> Any:
    """Return flashinfer's description of a module (its JitSpec), whose sources are written into flashinfer's cache."""
    from flashinfer import jit

    return jit.gen_batch_prefill_module(kind.value, *_arguments(head_dim))


def folder_of(base: Path) -> Path:
    """Return the folder of modules for the present architecture in a folder of flashinfer's form."""
    from flashinfer.jit import env

    folder: Path = base / env.FLASHINFER_JIT_DIR.relative_to(env.FLASHINFER_CACHE_DIR)
    return folder


def library_in(folder: Path, name: str) -> Path:
    return folder / name / f"{name}.so"


@contextmanager
def described(kind: Kind, head_dim: int) -> Iterator[None]:
    """Turn errors of flashinfer, its compiler and the dynamic linker into errors of ours, in one line each."""
    what = f"kernel {kind} for head size {head_dim}"
    try:
        yield
    except OSError as error:
        raise StorageError(f"{what}: {error}") from error
    except RuntimeError as error:
        logger.error("event=kernel_failed\n%s", error)
        raise DeviceUnavailableError(f"{what}: {toolchain.summarise(str(error))}") from error


def _arguments(head_dim: int) -> tuple[Any, ...]:
    import torch

    dtype, no_position, no_window, no_cap, wide_products = torch.bfloat16, 0, False, False, False
    types = (dtype, dtype, dtype, torch.int32)
    return *types, head_dim, head_dim, no_position, no_window, no_cap, wide_products


def _get(kind: Kind, head_dim: int) -> Any:
    from flashinfer.prefill import get_batch_prefill_module

    return get_batch_prefill_module(kind.value, *_arguments(head_dim))


def _load(kind: Kind, head_dim: int, unwritable: StorageError | None) -> Any:
    from flashinfer.jit import env

    with described(kind, head_dim):
        name = generate(kind, head_dim).name
        has_compiler = toolchain.find_cuda_home() is not None
        shipped = os.environ.get(KERNELS_VARIABLE)
        folders = [folder_of(Path(shipped))] if shipped else []
        if not has_compiler:
            folders.append(env.FLASHINFER_JIT_DIR)
        found = next((folder for folder in folders if library_in(folder, name).exists()), None)
        if found is not None:
            env.FLASHINFER_AOT_DIR = found  # flashinfer loads what is there without asking ninja
            return _get(kind, head_dim)
        if not has_compiler:
            place = f" in {KERNELS_VARIABLE}={shipped}" if shipped else ""
            raise DeviceUnavailableError(
                f"the kernel {name} for architecture {env.FLASHINFER_WORKSPACE_DIR.name} is not built{place}, and "
                "there is no nvcc to compile it: build it elsewhere (python -m toka_engine.model.aot --help)"
            )
        if unwritable is not None:
            raise unwritable
        return _compile(kind, head_dim, name)


def _compile(kind: Kind, head_dim: int, name: str) -> Any:
    """Load a module from flashinfer's cache, after compiling it if it is not there or no longer up to date."""
    from flashinfer.jit import env

    library = library_in(env.FLASHINFER_JIT_DIR, name)
    if library.exists():
        toolchain.choose_compiler()
        return _get(kind, head_dim)
    toolchain.prepare_build(env.FLASHINFER_WORKSPACE_DIR / "links")
    began_s = time.monotonic()
    logger.warning("event=compile_kernel library=%s", library)
    module = _get(kind, head_dim)
    logger.warning("event=compiled_kernel name=%s seconds=%.0f", name, time.monotonic() - began_s)
    return module


@contextmanager
def _workspace() -> Iterator[StorageError | None]:
    """Give flashinfer a temporary cache if its own cannot be written: it writes there even to load what is built.

    Yields why the cache cannot be written. Raises it, if nothing was built elsewhere.
    """
    base = Path(os.environ.get(WORKSPACE_VARIABLE, Path.home()))
    unwritable = None
    try:
        check_writable(base / ".cache" / "flashinfer", "the kernel cache")
    except StorageError as error:
        if not os.environ.get(KERNELS_VARIABLE):
            raise
        unwritable = error
        os.environ[WORKSPACE_VARIABLE] = temporary = _make_temporary()
    try:
        _import_flashinfer()
        yield unwritable
    finally:
        if unwritable is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _import_flashinfer() -> None:
    try:
        import flashinfer  # noqa: F401
    except ModuleNotFoundError as error:
        raise DeviceUnavailableError(
            f"a GPU needs the package flashinfer-python ({error.msg}): use an image built with EXTRAS=gpu, "
            "or device=cpu"
        ) from error


def _make_temporary() -> str:
    try:
        return tempfile.mkdtemp(prefix="toka-kernels-")
    except OSError as error:
        raise StorageError(f"no folder for temporary files can be written: {error.strerror}") from error
