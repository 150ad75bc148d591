"""Storage: checkpoints, and the files of a run directory."""
