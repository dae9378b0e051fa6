"""Keeps a patched model in sync with training: the Trainer callback, and what it calls."""
