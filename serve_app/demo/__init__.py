"""The main job from end to end on a small data set: what ``raylora demo`` and ``make demo`` run."""
