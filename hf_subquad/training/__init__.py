"""Keeping a patched model in step with training: the Trainer callback, and what it calls."""
