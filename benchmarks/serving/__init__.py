"""The engine end to end: queries, stages, throughput, galleries, cold starts and a model of cost."""
