"""Bytes only: containers and block layouts. No numerics, no torch."""
