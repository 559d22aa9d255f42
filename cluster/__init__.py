"""Ray nodes on rented pods: how a pod becomes one, and what an instance does in a cluster that is not its own."""
