"""Allocations: how one budget is spread over layers and heads."""

from pikv_core.registry import Registry

ALLOCATIONS = Registry("allocation", "ALLOCATIONS", "pikv_core.scheduling.allocation")
