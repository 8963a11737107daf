"""Codecs: how a stored token is represented; they never change which tokens exist."""

from pikv_core.registry import Registry

CODECS = Registry("codec", "CODECS", "pikv_core.compression")
