"""The model's forward in training, where nobody reads logits: only labelled positions, no padding. Exact."""
