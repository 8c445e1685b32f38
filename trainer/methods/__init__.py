"""Ways to train a student, one folder each: `method.py` says what a method is, `registry.py` lists them."""
