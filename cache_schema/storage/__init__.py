"""Bytes in places: whole files or none, checksums, locks, tar, Parquet that is not trusted. Knows no cache."""
