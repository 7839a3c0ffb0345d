"""Captured states on disk: stored by ``sglang-specforge capture``, trained on by ``python -m trainer --data``."""
