"""What `benchmarks.compare` does: figures out of result files, bands of noise, and versions measured in turns."""
