"""Batches for training: order, workers, memory that is used again."""
