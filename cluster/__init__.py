"""Ray nodes on rented pods."""
