"""Tensors in, tensors out: token tiles, importance of neurons, gathered products, and their backends."""
