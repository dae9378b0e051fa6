"""Kernels that stand in for the PyTorch implementation."""
