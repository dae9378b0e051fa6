"""Computes the language-model head and its loss at labelled positions only, which is exact."""
