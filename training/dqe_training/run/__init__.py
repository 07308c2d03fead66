"""A training run: its configuration, its steps, its state on the disk, and the workflow that makes one of a data source."""
