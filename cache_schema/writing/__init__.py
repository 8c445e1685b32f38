"""Making a cache: the plan, claims of shards, the writer."""
