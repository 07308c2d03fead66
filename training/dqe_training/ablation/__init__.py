"""Ablations: variants of the method x seeds, trained alike, compared in pairs with intervals (docs/method.md)."""
