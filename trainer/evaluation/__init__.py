"""Retrieval on classes never trained on."""
