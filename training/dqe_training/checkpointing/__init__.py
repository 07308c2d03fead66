"""Checkpoints on the disk: written, read and verified, what they say of themselves, and the one that training starts with."""
