"""Which neurons matter to which tokens: the sketch of the weights, and the queries that use it."""
