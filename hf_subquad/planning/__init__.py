"""Decides what each MLP may skip, from measurements on real batches."""
