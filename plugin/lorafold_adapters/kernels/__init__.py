"""Grouped low-rank products: every token of a batch has an adapter of its own, or none."""
