"""Triton and Gluon kernels for what torch and flashinfer do not fuse.

Each module owns its kernels, the Python functions that launch them and the packing of their arguments. Every launch can
be captured in a CUDA graph: no host synchronisation, sizes from shapes alone. Nothing here is imported on a machine
without a GPU, except by tests, which run the kernels in Triton's interpreter.
"""

from functools import cache

import torch

DEPENDENT_LAUNCH_CAPABILITY = 90
"""The first compute capability with programmatic dependent launch: a kernel starts while the previous one ends."""
HOPPER_CAPABILITY = 90
"""The only compute capability with asynchronous warpgroup MMA (wgmma): its successors do without."""
FP8_CAPABILITY = 89
"""The first compute capability that converts 8-bit floats by an instruction and multiplies them by tensor cores."""
_USUAL_PROCESSORS = 132
"""SMs of an H100, assumed where there is no GPU to ask."""


@cache
def count_processors(device: torch.device) -> int:
    """Return the number of the device's streaming multiprocessors."""
    if device.type != "cuda":
        return _USUAL_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def cdiv(number: int, divisor: int) -> int:
    """Return number / divisor, rounded up. Triton's function of this name takes 5 us in Python, at each launch."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """Return the least power of 2 that is `number` or more; `number` is at least 1."""
    return 1 << (number - 1).bit_length()
