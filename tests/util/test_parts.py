"""Loops over parts: all of them, or where a trace shortens them, two of each size."""

from wantrain.util.parts import parts, shortened


def test_whole():
    """Each row's tokens come once, in order."""
    assert list(parts(2, 5, 2)) == [(row, slice(*part)) for row in (0, 1) for part in ((0, 2), (2, 4), (4, 5))]
    assert list(parts(1, 3, 8)) == [(0, slice(0, 3))]
    assert not list(parts(1, 0, 8))


def test_shortened():
    """Two parts of a size stand for all of that size, and only inside."""
    counts, weights = [1], []
    with shortened(counts.append):
        found = []
        for row, part in parts(3, 7, 2):
            found.append((row, part.stop - part.start))
            weights.append(counts[-1])
    assert found == [(0, 2), (0, 2), (0, 1), (1, 1)] and weights == [1, 8, 1, 2] and counts[-1] == 1
    assert sum(size * weight for (_, size), weight in zip(found, weights, strict=True)) == 3 * 7
    assert len(list(parts(3, 7, 2))) == 12
