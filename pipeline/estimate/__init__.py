"""What a build would take: bytes, hours, memory: `dit-cache estimate`."""
