"""Few-label experiments: every method of the paper under one protocol."""
