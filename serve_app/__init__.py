"""HTTP side of raylora: a Ray Serve application of ingress, validation, dispatch and GPU replicas."""
