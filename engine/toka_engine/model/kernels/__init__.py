"""Triton kernels of the GPU path: what torch and flashinfer do not fuse.

Each module owns its kernels and the Python functions that launch them. Every launch can be captured in a CUDA graph:
no host synchronisation, sizes from shapes alone. Nothing here is imported on a machine without a GPU, except by the
tests, which run the kernels in Triton's interpreter.
"""

DEPENDENT_LAUNCH_CAPABILITY = 90
"""The first compute capability with programmatic dependent launch: a kernel starts while the one before ends."""
HOPPER_CAPABILITY = 90
"""The one with asynchronous products of warpgroups (wgmma), which its successors have no more."""
