"""Kernels for devices."""
