"""The square that a box of an object is padded to, where a teacher is shown squares."""

Box = tuple[float, float, float, float]


def square_around(box: Box, size: tuple[int, int]) -> Box:
    """The square around a box (left, top, right, bottom, pixels), as long as its longer side and about its centre.

    What of the box lies outside of the image of `size` (width, height) does not count; the square may reach beyond it.
    """
    width, height = size
    x0, y0, x1, y1 = max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3])
    side, x, y = max(x1 - x0, y1 - y0), (x0 + x1) / 2, (y0 + y1) / 2
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2
