"""The sparse MLP that a patched model uses, and what all MLPs of a model share."""
