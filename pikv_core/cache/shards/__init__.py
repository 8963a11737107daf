"""Older tokens in the shards of experts, of which a query reads the best."""
