"""Block policies of the request-level simulation."""

from pikv_core.registry import Registry

REQUEST_POLICIES = Registry("policy", "REQUEST_POLICIES", "pikv_core.simulation.policies")
