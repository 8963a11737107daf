"""Data tasks: what the models are trained and measured on."""

from pikv_core.registry import Registry

TASKS = Registry("task", "TASKS", "pikv_core.data")
