"""Data: problems and preference pairs, from their sources to prompt tokens."""
