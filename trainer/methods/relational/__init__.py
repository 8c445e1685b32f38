"""Similarities between images, as the teacher's features have them, beside DRC."""
