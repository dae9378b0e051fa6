"""What each MLP may skip: measured on real batches, then chosen."""
