"""Readers of request traces, one file per format."""

from pikv_core.registry import Registry

READERS = Registry("reader", "READERS", "pikv_core.simulation.readers")
