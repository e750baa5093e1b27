"""The NVIDIA GPU backend: runner, attention, sampler, CUDA graphs of decode steps, and finding compiled kernels.

`flashinfer_modules` and `toolchain` are also what the build of flashinfer's kernels needs (see `aot`): an image layer
copies them with `errors`, `output`, `folders` and `memory` alone, so that a change elsewhere compiles nothing of
flashinfer's again. They may import nothing else of ours.
"""
