"""Devices: mesh, processes, memory, and the environment that JAX starts in."""
