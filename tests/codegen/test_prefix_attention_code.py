"""The compiler makes good code of attention over shared tokens, for a GPU that is not there.

The speed that the kernel is built for depends on it, and its results do not. In a process of its own, as other tests
run the kernel in Triton's interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton

from tests.fault.image import run

pytestmark = pytest.mark.timeout(300)
REGISTERS = 65536
SHARED_BYTES = 227 << 10
"""The registers of one of an H100's processors."""
RESERVED_BYTES = 1 << 10
"""The bytes of shared memory that each program has."""
MOST_REGISTERS = 256
"""The registers of a thread, which has 255 and is given a multiple of 8."""

NUM_WARPGROUPS = 3
"""That multiply, in the kernel for Hopper."""

COMPILE = """
import json, sys
import torch
from toka_engine.model.aot.triton_build import Variants
from toka_engine.model.kernels.prefix_attention import attend_prefix
from toka_engine.model.kernels.prefix_groups import PrefixLaunchConfig, PrefixWorkspace, packed_size
capability, head_dim, for_hopper, cubin = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "hopper", sys.argv[4]
meta = torch.device("meta")
def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=meta)
variants = Variants(capability)
with variants.recording():
    config = PrefixLaunchConfig.for_hopper(head_dim) if for_hopper else PrefixLaunchConfig.of(head_dim)
    work = PrefixWorkspace.allocate(32, 8, head_dim, meta, config)
    keys, values = tensor(2, 64, 8, 16, head_dim).transpose(2, 3)
    attend_prefix(
        tensor(64, 32, head_dim), tensor(packed_size(256), dtype=torch.int32), tensor(9, 64, dtype=torch.int32), keys,
        values, tensor(64, 32, head_dim), tensor(64, 32, dtype=torch.float32), work, 0.125,
    )
((function, data),) = variants.found.values()
compiled = function.preload(data)
with open(cubin, "wb") as file:
    file.write(compiled.asm["cubin"])
print(json.dumps([compiled.asm["ttgir"], compiled.asm["ptx"], compiled.metadata.shared,
                  config.num_warps, config.num_stages, config.residency, config.max_registers]))
"""


def compile_kernel(head_dim: int, folder: Path, which: str = "any") -> list[Any]:
    """Compiles for an H100 and leaves the machine code in folder/code.cubin."""
    done = run("-c", COMPILE, "90", str(head_dim), which, str(folder / "code.cubin"), TRITON_CACHE_DIR=folder)
    assert done.returncode == 0, done.stderr
    compiled: list[Any] = json.loads(done.stdout)
    return compiled


def find_loops_of_products(cubin: Path) -> list[list[str]]:
    """The instructions of each innermost loop that multiplies matrices."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    code = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/ +(\S.*?) *;", code)]
    number = {at: n for n, (at, _) in enumerate(found)}
    jumps = [
        (number[int(to[1], 16)], n) for n, (_, what) in enumerate(found) if (to := re.search(r"BRA (0x\w+)", what))
    ]
    back = [(begin, end) for begin, end in jumps if begin <= end]
    innermost = [
        one for one in back if not any(one != other and one[0] <= other[0] <= other[1] <= one[1] for other in back)
    ]
    loops = [[what for _, what in found[begin : end + 1]] for begin, end in innermost]
    return [loop for loop in loops if any("HGMMA" in what for what in loop)]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_keys_and_values_are_on_their_way_to_the_tensor_cores_while_they_work(tmp_path: Path, head_dim: int) -> None:
    ttgir, ptx, shared_bytes, num_warps, num_stages, residency, max_registers = compile_kernel(head_dim, tmp_path)
    loops = re.findall(r"scf\.for .*?scf\.yield", ttgir, re.S)
    (loop,) = (each for each in loops if "warp_group_dot " in each)
    assert len(re.findall(r"ttng\.warp_group_dot .*isAsync = true", loop)) == 2
    assert len(re.findall(r"async_copy_global_to_local", loop)) == 2
    assert f"memdesc<{num_stages}x" in loop
    assert not re.search(r"arith\.select [^\n]*xf32", loop)  # full blocks take no masks
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global [^,]*, [^,]*, (\w+)", ptx)
    assert sizes
    assert set(sizes) == {"0x10"}  # bytes: pieces as large as there are
    assert residency * (shared_bytes + RESERVED_BYTES) <= SHARED_BYTES
    assert residency * 32 * num_warps * (max_registers or MOST_REGISTERS) <= REGISTERS


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_warpgroups_registers_hold_what_it_works_on_and_its_loop_takes_no_masks(
    tmp_path: Path, head_dim: int
) -> None:
    """The kernel for Hopper."""
    ttgir, ptx, shared_bytes, *_ = compile_kernel(head_dim, tmp_path, "hopper")
    loops = find_loops_of_products(tmp_path / "code.cubin")
    assert len(loops) == NUM_WARPGROUPS
    assert not [each for loop in loops for each in loop if re.match(r"(@!?U?P\d )?(LDL|STL)", each)]
    assert shared_bytes + RESERVED_BYTES <= SHARED_BYTES
    loops = [loop for loop in re.findall(r"scf\.for .*?scf\.yield", ttgir, re.S) if "warp_group_dot " in loop]
    assert len(loops) == NUM_WARPGROUPS
    for loop in loops:
        assert len(re.findall(r"ttng\.warp_group_dot .*isAsync = true", loop)) == 2
        assert not re.search(r"arith\.select [^\n]*xf32", loop)
    pages_of_a_block, boxes_of_a_page = {64: (8, 1), 128: (4, 2)}[head_dim]
    assert ptx.count("cp.async.bulk.tensor.2d") == 2 * pages_of_a_block * boxes_of_a_page  # of keys and of values


@pytest.mark.parametrize(("which", "num_waits"), [("any", 1), ("hopper", NUM_WARPGROUPS + 1)])
def test_only_what_describes_groups_is_read_before_the_wait_for_the_kernel_before(
    tmp_path: Path, which: str, num_waits: int
) -> None:
    before, *after = compile_kernel(64, tmp_path, which)[1].split("griddepcontrol.wait")
    assert len(after) == num_waits  # of each kind of warp
    assert before.count("griddepcontrol.launch_dependents") == 1
    assert all(words.endswith(".b32") for words in re.findall(r"\bld\.\S*global\S*", before))
    assert "cp.async" not in before
    assert not re.findall(r"\b(?:st|red|atom)\.\S*global", before)
    assert re.findall(r"\bst\.\S*global", after[0])
    # Programs without work wait too: what waits for this kernel waits for the ones before it.
    assert not re.findall(r"\bret;", before)
