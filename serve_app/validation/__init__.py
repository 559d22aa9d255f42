"""Checks requests away from the ingress loop: YAML, pictures, sizes; stores what an upload brought."""
