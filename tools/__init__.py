"""Optional commands around the four scripts at the top: python -m tools.NAME."""
import training                                              # noqa: F401, answers Ctrl-C in slow imports
