"""A picture of what a cache holds: `dit-cache preview`."""
