"""Reading numbers of any number of bits, most significant first, as video codecs write their headers."""

from __future__ import annotations


class BitReader:
    """Bits of a header, one field after the other.

    Args:
        data: the header; it is short, and more than what is read may follow.

    Raises:
        EOFError: from every method, where the bits have come to their end.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read(self, count: int) -> int:
        """The next ``count`` bits as a number."""
        end = self._at + count
        if end > 8 * len(self._data):
            raise EOFError
        first, last = self._at // 8, -(-end // 8)
        number = int.from_bytes(self._data[first:last]) >> (8 * last - end)
        self._at = end
        return number & ((1 << count) - 1)

    def skip(self, count: int) -> None:
        """Pass over ``count`` bits."""
        self._at += count

    def exponential_golomb(self) -> int:
        """A number in exponential Golomb code (ITU-T H.265, 9.2; AV1's uvlc): as many bits as zeros stand before a one."""
        zeros = 0
        while not self.read(1):
            zeros += 1
            if zeros > 32:
                raise EOFError
        return (1 << zeros) - 1 + self.read(zeros)
