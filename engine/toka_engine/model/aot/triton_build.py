"""AOT-compiles our Triton kernels without a GPU: every variant that a start of the engine asks for.

There is no list of variants: dry runs of models whose sizes cover those of all served models make Triton report what it
would compile. Besides a kernel's constants two things decide a variant: whether an integer or an address is divisible
by 16, and whether an integer is 1; kernels exempt arguments that vary freely. Triton compiles and keys each variant
itself (JITFunction.preload), so it finds at run time what was built here.

A model of other sizes starts too, after ptxas, which comes with Triton, has compiled the missing variants: the C
modules depend on the types of arguments only, and serve it as they are.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.errors import TritonError

from toka_engine.config import EngineConfig
from toka_engine.errors import ConfigError, DeviceUnavailableError, StorageError
from toka_engine.model.aot.triton_dry_run import ALONE, DryRanks, dry_run
from toka_engine.model.architectures.registry import MODELS
from toka_engine.model.config_fields import ConfigFields
from toka_engine.model.cuda import toolchain
from toka_engine.model.cuda.triton_cache import KernelCache, find_c_compiler, folder_of, pin_keys
from toka_engine.model.kernels import FP8_CAPABILITY
from toka_engine.model.memory import count_threads
from toka_engine.model.model_config import ModelConfig, parse_model_config
from toka_engine.model.quantization import Quantization

_HEAD_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Head counts to dry-run. Each stands for all values above the previous one, as do all sizes here."""
_HIDDEN_SIZES = (512, 1024, 2048, 4096, 8192, 16384)
_INTERMEDIATE_SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_VOCAB_SIZES = (32768, 65536, 131072, 262144)
_RANKS = (2, 4, 8)
FP8_CACHE = EngineConfig(seed=0, kv_cache_dtype="fp8")
"""Settings by which attention asks for other variants: its kernels are those of each number of heads."""
_SHARDED_VOCAB_SIZES = (8192, 16384, *_VOCAB_SIZES)
"""The vocabulary's part of each of two ranks stands for parts of that size of any number of ranks."""

Shape: TypeAlias = (
    tuple[ModelConfig, int] | tuple[ModelConfig, int, DryRanks] | tuple[ModelConfig, int, DryRanks, EngineConfig]
)
"""A model, the page size, the rank that has a part of the model (without one: all of it), and other settings."""


class _Target:
    """A Triton driver for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Variants:
    """The variants that Triton would have compiled: by kernel and key, the kernel and its specialisation."""

    def __init__(self, capability: int) -> None:
        """Set, once per process, the GPU that Triton compiles for."""
        self._has_fp8 = capability >= FP8_CAPABILITY
        if knobs.runtime.interpret:
            raise ConfigError("TRITON_INTERPRET is set: nothing can be compiled")
        self.found: dict[tuple[str, str], tuple[Any, str]] = {}
        driver.set_active(_Target(capability))

    def record(self, shapes: Iterable[Shape]) -> None:
        """Add the variants that starts of the engine ask for."""
        with self.recording():
            for shape in shapes:
                if self._has_fp8 or FP8_CACHE not in shape:  # without, an engine has no such cache
                    dry_run(*shape)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Add the variants that are launched inside the context."""
        knobs.runtime.jit_cache_hook = self._note
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = None

    def _note(self, *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        self.found[fn.name, key] = fn.jit_function, compile["specialization_data"]
        return True  # nothing is compiled, nothing launched


def list_shapes(head_dims: Sequence[int]) -> Iterator[Shape]:
    """List models and page sizes that together ask for every variant that an image holds."""
    page_size = EngineConfig().page_size
    for head_dim in head_dims:
        for kv_heads, heads in itertools.combinations_with_replacement(_HEAD_COUNTS, 2):
            model = make_model(head_dim=head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads)
            yield model, page_size
            yield model, page_size, ALONE, FP8_CACHE
        for architecture in MODELS:
            yield make_model(architecture, head_dim=head_dim), page_size
    for hidden_size in _HIDDEN_SIZES:
        yield make_model(hidden_size=hidden_size), page_size
    for vocab_size in _VOCAB_SIZES:
        yield make_model(vocab_size=vocab_size), page_size
        yield make_model(vocab_size=vocab_size - 1), page_size
    yield make_model(attention_bias=True, mlp_bias=True), page_size
    yield from _list_fp8_shapes(page_size)
    yield make_model(), 1  # a size of 1 is a type of its own to Triton
    yield make_model(), page_size, DryRanks(0, 1, has_stages=True)
    yield from _list_rank_shapes(page_size)


def _list_fp8_shapes(page_size: int) -> Iterator[Shape]:
    """List what models with weights of 8-bit floats ask for beyond that: kernels that hold a row in their registers."""
    for hidden_size in _HIDDEN_SIZES:
        # Attention's output has as many values, and of several ranks one norms in another kernel.
        heads = {"head_dim": 64, "num_attention_heads": hidden_size // 64}
        for has_bias in (False, True):
            model = make_fp8_model(hidden_size=hidden_size, attention_bias=has_bias, **heads)
            yield model, page_size
            yield model, page_size, DryRanks(0, 2)
    for intermediate_size in _INTERMEDIATE_SIZES:
        yield make_fp8_model(intermediate_size=intermediate_size), page_size
    yield make_fp8_model(attention_bias=True, mlp_bias=True), page_size
    for rank in (DryRanks(0, 2), DryRanks(1, 2)):
        yield make_fp8_model(attention_bias=True, mlp_bias=True), page_size, rank


def _list_rank_shapes(page_size: int) -> Iterator[Shape]:
    """List what ranks of tensor parallel models ask for beyond that: heads of their own number are listed above."""
    first, last = DryRanks(0, 2), DryRanks(1, 2)
    for num_ranks in _RANKS:
        for hidden_size in _HIDDEN_SIZES:
            yield make_model(hidden_size=hidden_size), page_size, DryRanks(0, num_ranks)
    for vocab_size in _SHARDED_VOCAB_SIZES:
        yield make_model(vocab_size=vocab_size), page_size, first
        for rank in (first, last):  # the last one's part is shorter
            yield make_model(vocab_size=vocab_size - 1), page_size, rank
    for rank in (first, last):  # one of them alone adds the biases of sums
        yield make_model(attention_bias=True, mlp_bias=True), page_size, rank


def make_model(architecture: str = "LlamaForCausalLM", **fields: int) -> ModelConfig:
    """Make a model of one layer; `fields` are those of config.json."""
    defaults = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 1,
        "head_dim": 64,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 64,
    }
    return parse_model_config(ConfigFields({"architectures": [architecture], **defaults, **fields}, Path()))


def make_fp8_model(**fields: int) -> ModelConfig:
    """Make a model of one layer whose weights are 8-bit floats."""
    return replace(make_model("LlamaForCausalLM", **fields), quantization=Quantization(None))


def build(out_dir: Path, capability: int, shapes: Iterable[Shape]) -> None:
    """Compile the variants that `shapes` ask for and `out_dir` lacks. `capability` is given as 90.

    Raises DeviceUnavailableError (no C compiler, or a compiler fails), StorageError.
    """
    began_s = time.monotonic()
    title = f"triton capability={capability}"
    pin_keys()
    variants = Variants(capability)
    variants.record(shapes)
    print(f"{title}: {len(variants.found)} variants of kernels", file=sys.stderr, flush=True)
    folder = folder_of(out_dir, capability)
    cache = KernelCache(folder)
    knobs.cache.dir, knobs.cache.manager_class = str(folder), cache.open
    knobs.compilation.store_binary_only = True
    try:
        with _driver_library(), ThreadPoolExecutor(count_threads()) as pool:
            kernels = list(pool.map(lambda found: found[0].preload(found[1]), variants.found.values()))
            # Triton makes its C modules itself: one to load kernels, and one per signature to launch them.
            nvidia.CudaUtils()
            for kernel in kernels:
                nvidia.CudaLauncher(kernel.src, kernel.metadata)
    except (subprocess.CalledProcessError, RuntimeError, TritonError) as error:
        raise DeviceUnavailableError(f"{title}: {toolchain.summarise(str(error))}") from error
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(
        f"{title}: {time.monotonic() - began_s:.0f} s, {len(cache.compiled)} kernels and {cache.num_modules_compiled} "
        f"modules compiled, {num_bytes / 1e6:.1f} MB",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def _driver_library() -> Iterator[None]:
    """Give Triton, which links its C modules against the GPU's driver and loads them, `make_driver_library`'s."""
    with tempfile.TemporaryDirectory(prefix="toka-driver-") as temporary:
        ctypes.CDLL(str(make_driver_library(Path(temporary))), mode=ctypes.RTLD_GLOBAL)
        knobs.nvidia.libcuda_path = temporary
        yield


def make_driver_library(folder: Path) -> Path:
    """Make a libcuda.so.1 with all functions of the driver, none of which does anything.

    Raises DeviceUnavailableError if there is no C compiler, CalledProcessError if it fails, StorageError.
    """
    (header,) = (Path(path) / "cuda.h" for path in nvidia.include_dirs)
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*", header.read_text())))
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    compiler = find_c_compiler("the modules with which Triton loads and launches kernels")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
    try:
        source.write_text("\n".join(f"int {name}(void) {{ return 100; }}" for name in names))
    except OSError as error:
        raise StorageError(f"cannot write {source}: {error.strerror}") from error
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return library
