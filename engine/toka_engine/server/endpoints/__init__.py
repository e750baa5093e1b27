"""The endpoints: a module each, with its bodies, its checks and its answer."""
