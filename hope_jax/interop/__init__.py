"""Weights of other libraries: read ``llama.py``."""
