"""One file per command of `dit-cache`: its options, and the call of what does the work."""
