"""Operations on the hot path: one op per file, each with a plain PyTorch definition."""
