"""The weight matrices of an MLP: rows by neuron, and their trainable low-rank updates."""
