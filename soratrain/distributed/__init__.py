"""Strategies, checkpoints and weight averaging over one or many processes."""
