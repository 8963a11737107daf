"""Recorded attention: its file, and the replay of token policies over it."""
