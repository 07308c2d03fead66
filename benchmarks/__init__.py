"""Benchmarks of the engine: run as modules from the repository root, see README.md."""
