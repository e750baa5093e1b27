"""Our Triton kernels are compiled ahead without a GPU, found again, and missed with a sentence.

Each case is a process of its own: Triton decides once per process for which GPU it compiles, and other tests run these
kernels in its interpreter. Launches go through Triton's own code up to the GPU; the driver's library is one whose
functions do nothing.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from toka_engine.errors import ExitCode

from tests.fault.image import copy_stage, run

pytestmark = pytest.mark.timeout(900)

BUILD = """
import sys
from pathlib import Path
from toka_engine.config import EngineConfig
from toka_engine.errors import TokaError
from toka_engine.model.aot import triton_build
stands_for_smollm2 = triton_build.make_model("Qwen3ForCausalLM", hidden_size=1024, num_attention_heads=16,
                                             num_key_value_heads=4, vocab_size=65536)
try:
    triton_build.build(Path(sys.argv[1]), 90, [(stands_for_smollm2, 16)])
except TokaError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""

MAKE_DRIVER_LIBRARY = """
import sys
from pathlib import Path
from toka_engine.model.aot.triton_build import make_driver_library
make_driver_library(Path(sys.argv[1]))
"""

LAUNCH = """
import ctypes, json, logging, sys
from types import SimpleNamespace
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from toka_engine.config import EngineConfig
from toka_engine.errors import TokaError
from toka_engine.model.aot.triton_build import make_model
from toka_engine.model.cuda.triton_cache import log_compiled
from toka_engine.model.aot.triton_dry_run import dry_run
from toka_engine.model.kernels.activation import silu_mul
from toka_engine.model.kernels.norm import rms_norm
from toka_engine.model.devices import select_backend
from toka_engine.model.ranks import SingleRank

class Driver:
    "Triton's own for NVIDIA, less the GPU: each kernel's binary and the module that launches it are only loaded."
    def __init__(self, capability):
        nvidia.CudaUtils()
        self.target = GPUTarget("cuda", capability, 32)
        self.binaries = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448}, load_binary=self.load_binary
        )
    def load_binary(self, name, binary, shared, device):
        self.binaries.append(binary[:4])
        return 1, 1, 32, 0, 1024
    def launcher_cls(self, src, metadata):
        nvidia.CudaLauncher(src, metadata)
        return lambda *arguments: None
    def get_current_target(self):
        return self.target
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

ctypes.CDLL(sys.argv[1] + "/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
what, capability = sys.argv[2], int(sys.argv[3])
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
torch.cuda.get_device_capability = lambda device: divmod(capability, 10)
select_backend(torch.device("cuda"), EngineConfig(), SingleRank())
cache = knobs.cache.manager_class.__self__
try:
    fake = Driver(capability)
    driver.set_active(fake)
    if what == "start":
        smollm2 = make_model("LlamaForCausalLM", hidden_size=576, num_attention_heads=9, num_key_value_heads=3,
                             vocab_size=49152, intermediate_size=1536)
        dry_run(smollm2, 16)
        rms_norm(torch.zeros(3, 576, dtype=torch.bfloat16), torch.zeros(576, dtype=torch.bfloat16), 1e-5)
    else:
        silu_mul(torch.zeros(3, 2 * 256, dtype=torch.bfloat16))
except TokaError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
log_compiled()
assert set(fake.binaries) == {b"\\x7fELF"}
print(json.dumps([len(fake.binaries), cache.num_built, len(cache.compiled), cache.num_modules_compiled]))
"""

COMPILE_SINGLE_ROW = """
import json, sys
import torch
from toka_engine.model.aot.triton_build import Variants
from toka_engine.model.kernels.gemv import TritonGemv
capability = int(sys.argv[1])
def tensor(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")
variants = Variants(capability)
with variants.recording():
    kernels, row, norm = TritonGemv.for_capability(capability), tensor(1, 576), tensor(576)
    kernels.norm_gemv(row, norm, 1e-5, tensor(960, 576), tensor(960))
    kernels.norm_gated_gemv(row, norm, 1e-5, tensor(3072, 576), None)
    kernels.gemv_add(tensor(1, 1536), tensor(576, 1536), None, row)
    kernels.head_gemv(row, tensor(49152, 576))
compiled = [function.preload(data) for function, data in variants.found.values()]
print(json.dumps([[each.metadata.launch_pdl, each.asm["ptx"]] for each in compiled]))
"""


COMPILE_FP8_ROW = """
import json, subprocess, sys
from pathlib import Path
import torch, triton
from toka_engine.model.aot.triton_build import Variants
from toka_engine.model.kernels.fp8_gemv import Fp8Gemv
capability = int(sys.argv[1])
def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")
variants = Variants(capability)
with variants.recording():
    kernels = Fp8Gemv.for_capability(capability, tensor(4096, dtype=torch.float32))
    for width in (4096, 8192):
        x, weight = tensor(1, width), tensor(4096, width, dtype=torch.float8_e4m3fn)
        kernels.norm_gemv(x, tensor(width), 1e-5, weight, tensor(4096))
        kernels.norm_gated_gemv(x, tensor(width), 1e-5, weight, None)
    for width in (4096, 14336):
        kernels.gemv_add(tensor(1, width), tensor(4096, width, dtype=torch.float8_e4m3fn), None, tensor(1, 4096))
compiled = [function.preload(data) for function, data in variants.found.values()]
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
def find_usage(binary):
    Path(sys.argv[2]).write_bytes(binary)
    return subprocess.run([tool, "-res-usage", sys.argv[2]], check=True, capture_output=True, text=True).stdout
print(json.dumps([[each.metadata.launch_pdl, find_usage(each.asm["cubin"]), each.asm["ptx"]] for each in compiled]))
"""


@pytest.fixture(scope="module")
def driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    done = run("-c", MAKE_DRIVER_LIBRARY, str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the kernels of models like SmolLM2, built from what the image's stage sees, then moved."""
    source, out_dir = tmp_path_factory.mktemp("image"), tmp_path_factory.mktemp("stage") / "kernels"
    copy_stage("engine-kernels", source)
    copy_stage("engine-triton", source)
    done = run("-c", BUILD, str(out_dir), source=source)
    assert done.returncode == 0, done.stderr
    return out_dir.rename(tmp_path_factory.mktemp("moved") / "kernels")


@pytest.fixture
def without_compiler(tmp_path: Path) -> dict[str, Path]:
    """An environment where no program can be found, and where Triton's cache cannot be written."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    return {"PATH": tmp_path / "empty", "TRITON_CACHE_DIR": tmp_path / "file" / "triton"}


def launch(driver_library: Path, what: str, capability: int = 90, **env: Any) -> Any:
    # Triton looks for the driver's library before it looks into its cache.
    return run("-c", LAUNCH, str(driver_library), what, str(capability), TRITON_LIBCUDA_PATH=driver_library, **env)


def test_kernels_are_compiled_for_the_architecture_without_a_gpu(built: Path) -> None:
    (folder,) = built.glob("triton-*/90")
    binaries = [path.read_bytes() for path in folder.rglob("*.cubin")]
    assert len(binaries) >= 30
    for binary in binaries:
        assert binary.startswith(b"\x7fELF")
        (machine,), (flags,) = struct.unpack_from("<H", binary, 18), struct.unpack_from("<I", binary, 48)
        assert (machine, flags & 0xFF) == (190, 90)  # CUDA, sm_90


def test_a_start_finds_all_that_was_built_with_no_compiler_and_no_cache_to_write_to(
    built: Path, driver_library: Path, without_compiler: dict[str, Path]
) -> None:
    done = launch(driver_library, "start", TOKA_KERNELS_DIR=built, **without_compiler)
    assert done.returncode == 0, done.stderr
    (folder,) = built.glob("triton-*/90")
    num_loaded, num_built, *compiled = json.loads(done.stdout)
    assert num_loaded == num_built >= 29
    assert compiled == [0, 0]
    assert f"INFO event=triton_kernels folder={folder}\n" in done.stderr
    assert f"INFO event=triton_kernels_ready built={num_built} compiled=0 modules_compiled=0\n" in done.stderr


def test_what_is_built_is_not_built_again(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    done = run("-c", BUILD, str(built))
    assert done.returncode == 0, done.stderr
    assert "0 kernels and 0 modules compiled" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_a_kernel_that_is_not_built_is_compiled_into_tritons_cache_without_a_c_compiler(
    built: Path, driver_library: Path, without_compiler: dict[str, Path], tmp_path: Path
) -> None:
    env = {**without_compiler, "TRITON_CACHE_DIR": tmp_path / "cache"}
    before = set(built.rglob("*"))
    for expected in ([1, 0, 1, 0], [1, 0, 0, 0]):
        done = launch(driver_library, "activation", TOKA_KERNELS_DIR=built, **env)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == expected
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 1
    assert set(built.rglob("*")) == before


def test_a_cache_that_cannot_be_written_is_named_where_a_kernel_would_go_there(
    built: Path, driver_library: Path, without_compiler: dict[str, Path]
) -> None:
    done = launch(driver_library, "activation", TOKA_KERNELS_DIR=built, **without_compiler)
    assert done.returncode == ExitCode.STORAGE_FAILED
    words = done.stderr.splitlines()[-1]
    assert "a kernel must be compiled, but Triton's cache cannot be written: " in words
    assert str(without_compiler["TRITON_CACHE_DIR"]) in words
    assert words.endswith("Not a directory")


def test_kernels_for_another_gpu_are_not_used_and_a_line_says_so(
    built: Path, driver_library: Path, tmp_path: Path
) -> None:
    done = launch(
        driver_library, "activation", 80, TOKA_KERNELS_DIR=built, TRITON_CACHE_DIR=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, 0, 1, 2]
    (warning,) = (line for line in done.stderr.splitlines() if line.startswith("WARNING"))
    assert "event=no_triton_kernels" in warning
    assert f"{built}/triton-" in warning
    assert f"/80: compiling them now, into cache={tmp_path}" in warning


def test_without_built_kernels_and_without_a_c_compiler_the_missing_module_is_named(
    driver_library: Path, without_compiler: dict[str, Path], tmp_path: Path
) -> None:
    env = {**without_compiler, "TRITON_CACHE_DIR": tmp_path / "cache"}
    done = launch(driver_library, "activation", **env)
    assert done.returncode == ExitCode.DEVICE_UNAVAILABLE
    words = done.stderr.splitlines()[-1]
    assert words.startswith("no C compiler (gcc, clang) to compile cuda_utils.")
    assert "TOKA_KERNELS_DIR" in words


def test_a_build_in_the_interpreters_mode_is_refused(tmp_path: Path) -> None:
    done = run("-c", BUILD, str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == ExitCode.CONFIG_INVALID
    assert done.stderr == "TRITON_INTERPRET is set: nothing can be compiled\n"


def test_a_build_without_a_c_compiler_is_refused(tmp_path: Path, without_compiler: dict[str, Path]) -> None:
    done = run("-c", BUILD, str(tmp_path / "out"), **without_compiler)
    assert done.returncode == ExitCode.DEVICE_UNAVAILABLE
    assert done.stderr.splitlines()[-1].startswith("no C compiler (gcc, clang) to compile the modules")
    assert not (tmp_path / "out").exists()


def test_a_build_whose_c_compiler_fails_says_so(tmp_path: Path) -> None:
    done = run("-c", BUILD, str(tmp_path / "out"), CC="false")
    assert done.returncode == ExitCode.DEVICE_UNAVAILABLE
    assert re.match(r"triton capability=90: Command .*false'.* returned non-zero", done.stderr.splitlines()[-1])


def test_kernels_for_one_row_touch_nothing_but_weights_before_they_wait_for_the_kernel_before(tmp_path: Path) -> None:
    done = run("-c", COMPILE_SINGLE_ROW, "90", TRITON_CACHE_DIR=tmp_path)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len(compiled) == 4
    for launch_pdl, ptx in compiled:
        assert launch_pdl
        before, after = ptx.split("griddepcontrol.wait")
        assert before.count("griddepcontrol.launch_dependents") == 1
        loads = re.findall(r"\bld\.\S*global\S*", before)
        assert loads
        assert all("evict_first" in load for load in loads)  # as weights alone are loaded
        assert not re.findall(r"\b(?:st|red|atom)\.\S*(?:global|async)", before)
        assert re.findall(r"\bst\.global", after)
        assert any("evict_first" not in load for load in re.findall(r"\bld\.global\S*", after))


def test_kernels_for_one_row_need_no_dependent_launch_on_older_gpus(tmp_path: Path) -> None:
    done = run("-c", COMPILE_SINGLE_ROW, "80", TRITON_CACHE_DIR=tmp_path)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len(compiled) == 4
    for launch_pdl, ptx in compiled:
        assert not launch_pdl
        assert "griddepcontrol" not in ptx


@pytest.mark.parametrize("capability", ["89", "90"])
def test_kernels_for_one_row_of_8_bit_floats_keep_in_registers_what_is_on_its_way(
    tmp_path: Path, capability: str
) -> None:
    done = run("-c", COMPILE_FP8_ROW, capability, str(tmp_path / "kernel"), TRITON_CACHE_DIR=tmp_path)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len(compiled) == 6
    for launch_pdl, usage, ptx in compiled:
        assert launch_pdl == (capability == "90")
        assert " STACK:0 " in usage
        assert int(re.findall(r" REG:(\d+) ", usage)[0]) <= 65536 // (2 * 256)  # for two programs of 8 warps
        assert len(re.findall(r"\bcvt\.rn\.f16x2\.e4m3x2", ptx)) == 4 * len(re.findall(r"\bmma\.sync", ptx))
        loads = re.findall(r"\bld\.global\S*", ptx)
        assert (
            sum("evict_first" in load and "v4" in load for load in loads) == 4 * 2 * 4
        )  # four times 16 weights of two outputs
        if launch_pdl:
            before, after = ptx.split("griddepcontrol.wait")
            assert "evict_first" in before
            assert not re.findall(r"\b(?:st|red|atom)\.\S*(?:global|async)", before)
            assert re.findall(r"\bst\.global", after)


KEYS = """
import sys
from toka_engine.model.cuda.triton_cache import pin_keys
pin_keys()
from toka_engine.model.kernels import filtering, sampling
kernels = {"stats": sampling._block_stats_kernel, "sample": sampling._sample_kernel}
kernels["sums"] = filtering._masked_sums_kernel
keys = {name: kernels[name].cache_key for name in sys.argv[1:]}
print(sorted(keys.items()))
"""


def test_a_kernels_key_does_not_depend_on_what_was_compiled_before() -> None:
    """All of these call a function with a constant, whose value is in the key of those that are not the first alone."""
    there, back = run("-c", KEYS, "stats", "sample", "sums"), run("-c", KEYS, "sums", "sample", "stats")
    assert there.returncode == 0, there.stderr
    assert there.stdout == back.stdout
    assert "stats" in there.stdout
