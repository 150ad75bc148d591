"""Reports: run directories -> figures and HTML pages. Imports no JAX."""
