"""Planning: compile a run for absent devices; bound its memory and its time."""
