"""The student alone."""
