"""Hands queued generations to the inference replicas and settles their records."""
