"""Plain regression of the teacher's features, beside DRC."""
