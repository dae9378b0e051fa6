"""The sparse MLP that stands in a patched model, and what all MLPs of a model share."""
