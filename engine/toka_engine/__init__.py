"""The engine: an HTTP server, a CPU manager and model workers, each a process, under one supervisor."""

__version__ = "0.1.0"
