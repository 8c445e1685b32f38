"""Batches from a cache: rows, images, features."""
