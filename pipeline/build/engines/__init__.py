"""Builds whose shards are handed out to many machines."""
