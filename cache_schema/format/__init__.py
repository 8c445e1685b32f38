"""What a cache's files say: manifest, identity, journal, samples, layout."""
