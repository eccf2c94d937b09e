"""Optional commands around the four scripts at the top: python -m tools.NAME."""
