"""From a plain model to a patched one and back: where MLPs are, whether they can be patched, and the patch."""
