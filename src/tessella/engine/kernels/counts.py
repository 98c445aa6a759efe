"""Small sums that every launch does on the host. Triton's own for them take about 4 us each, two hundred times a step."""


def power_of_two(count: int) -> int:
    """The least one that is not below count, which is at least 1."""
    return 1 << (count - 1).bit_length()


def pieces(count: int, size: int) -> int:
    """How many of that size hold count."""
    return -(-count // size)
