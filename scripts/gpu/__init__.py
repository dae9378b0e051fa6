"""Sections of gpu_check.py. Each has `cases(bench)`: names and functions that yield rows."""
