"""Errors of the trainer that are meant for the person at the terminal."""

from cache_schema.errors import DitDistillError


class TrainError(DitDistillError):
    """A run cannot start, continue or be read; the message says what is wrong, where, and what to do."""


class SharedError(TrainError):
    """An error that all processes of a run met alike: it is enough that the first one tells it."""
