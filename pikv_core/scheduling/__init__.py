"""Token policies: evictors score stored tokens (higher = keep), selectors choose the pages a query reads."""

from pikv_core.registry import Registry

POLICIES = Registry("policy", "POLICIES", "pikv_core.scheduling")
