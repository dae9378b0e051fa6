"""What the scripts about wide nets share."""
