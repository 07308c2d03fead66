"""What the three stages agree on: graph, preprocessing, tokenizer, vocabulary and zone specs, and the bundle manifest."""
