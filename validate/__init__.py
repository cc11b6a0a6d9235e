"""Reruns an artifact on its runtime and answers with numbers."""
