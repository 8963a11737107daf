"""PiKV's core: models, caches, compression, scheduling and their simulation; importing it is light."""

__version__ = "0.1.0"
