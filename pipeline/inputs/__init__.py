"""From samples to what a teacher sees: decoding, views, captions and their encodings."""
