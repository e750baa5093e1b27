"""Our own GPU kernels (Triton). Imported only where there is a GPU."""
