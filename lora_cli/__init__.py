"""Checkpoint surgery for low-rank adapters."""
