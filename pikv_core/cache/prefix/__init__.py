"""Blocks of prompts on disk, for prompts that begin alike."""
