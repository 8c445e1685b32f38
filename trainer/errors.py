"""Errors of the trainer that are meant for the person at the terminal."""

from cache_schema.errors import DitDistillError


class TrainError(DitDistillError):
    """A run cannot start, continue or be read; the message says what is wrong, where, and what to do."""
