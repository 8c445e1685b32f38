"""How chunks lie in files: Zarr shards, WebDataset tars, image tars, compression."""
