"""Boxes and captions for a data set: a detector finds the object, a vision-language model describes it.

`run` goes through a data set and writes one Parquet file (`table`); `detector` and `captioner` hold one model each,
`leaks` keeps class names out of captions, `work` makes it resumable, `sheet` draws it.
"""
