"""Our Triton kernels, compiled ahead and found again: a GPU pod compiles none.

`rehearsal` is a start of the engine on no device, `build` compiles what it asks for, `cache` is where Triton looks for
it at run time. flashinfer's kernels are those of `compiled`, whose command builds these too.
"""
