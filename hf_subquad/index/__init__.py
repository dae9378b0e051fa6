"""Which neurons matter for which tokens: the sketch of the weights, and the queries on it."""
