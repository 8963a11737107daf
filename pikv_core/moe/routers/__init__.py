"""Routers: which experts a token goes to, and with what weights."""

from pikv_core.registry import Registry

ROUTERS = Registry("router", "ROUTERS", "pikv_core.moe.routers")
