"""Lessons: what a model is trained to do, its loss and its held-out measurement; a task names its own."""

from pikv_core.registry import Registry

LESSONS = Registry("lesson", "LESSONS", "pikv_core.training.lessons")
