"""A cache that is split over ranks, by heads, tokens or shards."""
