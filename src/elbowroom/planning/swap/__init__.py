"""Decisions about a swapped training step: what is kept, what leaves, and when it comes back."""
