"""Tiny models, independent references and Trainer runs that several test files use."""
