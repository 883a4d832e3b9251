"""Pages: which part of the memory for keys and values belongs to whom. Integers only; slots.py holds the memory.

A sequence's keys are in pages of a fixed number of tokens. Sequences that begin the same way share their full pages.
"""


class Pages:
    """Hands out pages and counts who holds each.

    Args:
        count: number of pages.
        size: number of tokens in a page.

    Attributes:
        free: pages that nobody holds.
    """

    def __init__(self, count: int, size: int):
        self.size = size
        self.free = list(reversed(range(count)))
        self._holders = [0] * count

    def for_tokens(self, tokens: int) -> int:
        """Number of pages that hold this many tokens."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int]:
        """Takes free pages, of which there must be as many."""
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: list[int]) -> list[int]:
        """Makes one more holder of these pages. Returns them."""
        for page in pages:
            self._holders[page] += 1
        return pages

    def shared(self, page: int) -> bool:
        """Whether the page has several holders."""
        return self._holders[page] > 1

    def release(self, pages: list[int]) -> None:
        """Ends one holder's use of these pages. Those without another holder are free at once."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self.free.append(page)
