"""What blocks weigh and cost: bytes of keys and values, prefill times, servers, tiers of memory."""
