"""Ways to train a student."""
