"""Ahead-of-time (AOT) compilation of GPU kernels, without a GPU: `python -m toka_engine.model.aot OUT_DIR`.

flashinfer's modules are those of the table in `cuda.flashinfer_modules`. For our own kernels, `triton_dry_run` starts
an engine on no device, and `triton_build` compiles what it asks for; at run time `cuda.triton_cache` finds them.
"""
