"""Weights that ship with the package; weights/README.md says how they were made."""
