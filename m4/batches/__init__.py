"""From a token store to masked micro-batches."""
