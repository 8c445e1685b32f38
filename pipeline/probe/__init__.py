"""Which taps and timesteps tell most: `dit-cache probe`."""
