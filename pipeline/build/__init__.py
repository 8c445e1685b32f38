"""The build of a cache: `dit-cache build`."""
