"""Opening a cache and reading batches of features and images."""
