"""Reports: run directories -> figures and HTML pages."""
