"""The weight matrices of an MLP, one row per neuron, and their trainable low-rank updates."""
