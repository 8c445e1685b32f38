"""A trained student at work: embed images, index the embeddings, search the index, serve it as a page."""
