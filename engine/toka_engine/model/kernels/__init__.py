"""Triton and Gluon kernels for what torch and flashinfer do not fuse.

Each module owns its kernels, the Python functions that launch them and the packing of their arguments. Every launch can
be captured in a CUDA graph: no host synchronisation, sizes from shapes alone. Nothing here is imported on a machine
without a GPU, except by tests, which run the kernels in Triton's interpreter.
"""

DEPENDENT_LAUNCH_CAPABILITY = 90
"""The first compute capability with programmatic dependent launch: a kernel starts while the previous one ends."""
HOPPER_CAPABILITY = 90
"""The only compute capability with asynchronous warpgroup MMA (wgmma): its successors do without."""
FP8_CAPABILITY = 89
"""The first compute capability that converts 8-bit floats by an instruction and multiplies them by tensor cores."""
