"""The public name of `cache_schema.care.verify`: every file of a cache against the checksums in its journal."""

from cache_schema.care.verify import Problem, advice, verify

__all__ = ["Problem", "advice", "verify"]
