"""Where the numbers of the shards come from that one process of a build computes."""
