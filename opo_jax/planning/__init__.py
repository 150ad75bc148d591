"""Planning: compile a run for absent devices, and bound its memory and time."""
