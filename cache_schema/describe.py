"""The public name of `cache_schema.care.describe`: what a cache holds, as values and as text."""

from cache_schema.care.describe import describe, describe_text

__all__ = ["describe", "describe_text"]
