"""The language-model head and its loss on the labelled positions only. Exact."""
