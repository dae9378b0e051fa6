"""From a plain model to a patched one and back: finds MLPs, checks that they can be patched, and patches them."""
