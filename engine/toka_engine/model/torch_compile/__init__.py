"""torch_compile=T: a backend whose model torch.compile has compiled, and inductor's cache folder."""
