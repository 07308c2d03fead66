"""What `benchmarks.recall` measures: models, ways to store and search an index, galleries, and what their rankings are worth."""
