"""Model architectures: one module per architecture of config.json, and the registry that chooses among them."""
