"""Finds our compiled Triton kernels at run time: in an image's folder, else in Triton's cache, else it compiles them.

Triton's cache key of a kernel covers source, variant, options, ptxas and architecture. Some entries are kernels, the
others C modules that load and launch them, for which Triton calls gcc. `KernelCache` looks into the image's folder
first (TOKA_KERNELS_DIR), which is only read, and writes what is missing into Triton's cache (TRITON_CACHE_DIR, by
default `.triton/cache` in the home folder). It counts what had to be compiled: in an image, nothing.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import pkgutil
import shutil
import sysconfig
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.runtime.build import platform_key
from triton.runtime.cache import FileCacheManager

from toka_engine.errors import DeviceUnavailableError, StorageError
from toka_engine.model import kernels
from toka_engine.model.cuda.flashinfer_modules import KERNELS_VARIABLE

logger = logging.getLogger("toka.model")

_KERNEL_SUFFIX = ".cubin"
_MODULE_SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")


class KernelCache:
    """The cache manager that Triton asks for kernels."""

    def __init__(self, folder: Path | None) -> None:
        """`folder`: AOT-compiled kernels, in the form of Triton's cache."""
        self.folder = folder
        self.num_built = 0
        """Number of kernels found in `folder`."""
        self.compiled: list[str] = []
        """Names of kernels that were not there."""
        self.num_modules_compiled = 0
        self._lock = threading.Lock()

    def open(self, key: str, override: bool = False, dump: bool = False) -> Any:
        """Return a cache manager of Triton's for one key."""
        if override or dump:
            return FileCacheManager(key, override=override, dump=dump)
        return _Entry(self, key)

    def note_compiled(self, filename: str) -> None:
        with self._lock:
            if filename.endswith(_KERNEL_SUFFIX):
                self.compiled.append(filename.removesuffix(_KERNEL_SUFFIX))
            self.num_modules_compiled += filename.endswith(_MODULE_SUFFIX)


class _Entry:
    """One key's files, from the image or from Triton's cache."""

    def __init__(self, cache: KernelCache, key: str) -> None:
        self._cache, self._key = cache, key
        self._built = None if cache.folder is None else cache.folder / key

    def has_file(self, filename: str) -> bool:
        return self.get_file(filename) is not None

    def get_file(self, filename: str) -> str | None:
        if self._built is not None and (self._built / filename).exists():
            return str(self._built / filename)
        found: str | None = self._open_own().get_file(filename)
        if found is None and filename.endswith(_MODULE_SUFFIX):
            find_c_compiler(f"{filename}, with which Triton loads or launches kernels")
        return found

    def get_group(self, filename: str) -> Mapping[str, str] | None:
        """Return the files of the group `filename`, by name. They are next to it, not where Triton recorded them."""
        group = None if self._built is None else self._built / f"__grp__{filename}"
        if self._built is None or group is None or not group.exists():
            found: Mapping[str, str] | None = self._open_own().get_group(filename)
            return found
        self._cache.num_built += 1
        return {name: str(self._built / name) for name in json.loads(group.read_text())["child_paths"]}

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        self._cache.note_compiled(filename)
        try:
            path: str = self._open_own().put(data, filename, binary)
        except OSError as error:
            raise _describe(error) from error
        return path

    def put_group(self, filename: str, group: Mapping[str, str]) -> str:
        return self.put(json.dumps({"child_paths": group}), f"__grp__{filename}", binary=False)

    def _open_own(self) -> Any:
        """Open the files in Triton's cache. Makes their folder: whoever asks for a missing file will compile it."""
        try:
            return FileCacheManager(self._key)
        except OSError as error:
            raise _describe(error) from error


def folder_of(base: Path, capability: int) -> Path:
    """Return the folder below `base` (TOKA_KERNELS_DIR) with this Triton's kernels for a compute capability, as 90."""
    return base / f"triton-{triton.__version__}" / str(capability)


def find_c_compiler(what: str) -> str:
    """Find the C compiler that Triton would run. Raises DeviceUnavailableError, which says that `what` needs it."""
    named = os.environ.get("CC")
    names = ["gcc", "clang"] if named is None else [named]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise DeviceUnavailableError(
            f"no C compiler ({', '.join(names)}) to compile {what}: install one, or let {KERNELS_VARIABLE} name a "
            "folder where it is built (python -m toka_engine.model.aot --help)"
        )
    return found


def pin_keys() -> None:
    """Make cache keys independent of the machine's programs and of compile order. To be called before any launch.

    A kernel's key includes the constants of the functions it calls, but Triton does not know those of a function that
    it has not hashed before: so all of ours are hashed here, in a fixed order. Keys also include how Python's own
    executable is linked, which Python asks the program `file`, once per process, where there is one: it is hidden here.
    """
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, triton.JITFunction):
                _ = value.cache_key
    path = os.environ.get("PATH")
    os.environ["PATH"] = os.devnull
    try:
        platform_key.cache_clear()
        platform_key()
    finally:
        if path is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = path


def use_built(capability: int) -> KernelCache:
    """Let Triton find the image's kernels, if there are any for this Triton and this GPU."""
    global _used
    pin_keys()
    shipped = os.environ.get(KERNELS_VARIABLE)
    folder = folder_of(Path(shipped), capability) if shipped else None
    if folder is None:
        logger.info("event=triton_kernels folder=none cache=%s", knobs.cache.dir)
    elif folder.is_dir():
        logger.info("event=triton_kernels folder=%s", folder)
    else:
        logger.warning("event=no_triton_kernels folder=%s: compiling them now, into cache=%s", folder, knobs.cache.dir)
        folder = None
    _used = KernelCache(folder)
    knobs.cache.manager_class = _used.open
    return _used


def log_compiled() -> None:
    """Log, at the end of a start, how many kernels were found and how many compiled."""
    if _used is not None:
        logger.info(
            "event=triton_kernels_ready built=%d compiled=%d modules_compiled=%d%s",
            _used.num_built,
            len(_used.compiled),
            _used.num_modules_compiled,
            f" names={','.join(sorted(_used.compiled))}" if _used.compiled else "",
        )


_used: KernelCache | None = None


def _describe(error: OSError) -> StorageError:
    place = error.filename or knobs.cache.dir
    return StorageError(f"a kernel must be compiled, but Triton's cache cannot be written: {place}: {error.strerror}")
