"""The ``raylora`` command."""
