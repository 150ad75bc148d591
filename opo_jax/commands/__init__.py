"""Commands on finished runs and on data: evaluate, export, sample, variance, data."""
