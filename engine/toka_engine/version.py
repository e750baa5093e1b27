"""The engine's version; `scripts/release` writes it, with every other place that states it."""

__version__ = "0.1.0"
