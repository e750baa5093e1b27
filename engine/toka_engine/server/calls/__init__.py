"""Tool call formats: how a model writes calls of functions, a module each, and which one a chat template means."""
