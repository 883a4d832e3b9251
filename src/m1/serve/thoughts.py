"""Splits a model's text into its thought and its reply, while the text grows."""

OPEN, CLOSE = "<think>", "</think>"


class Thoughts:
    """Splits a growing text at its think tags. Joined with the tags, the parts are the text: nothing is lost.

    Args:
        opened: whether the prompt ended with <think>, as some chat templates do.
    """

    def __init__(self, opened: bool):
        self._start: int | None = 0 if opened else None  # of the thought in the text; -1 for a text without one
        self._end = -1  # of the thought, once it is closed
        self._searched = 0

    def split(self, text: str, done: bool) -> tuple[str, str]:
        """The thought and the reply so far. An end that may become a tag is held back until it is decided.

        Args:
            text: begins with the text of the call before.
            done: whether it is complete.
        """
        if self._start is None:
            begun = text.lstrip()
            if begun.startswith(OPEN):
                self._start = len(text) - len(begun) + len(OPEN)
            elif OPEN.startswith(begun) and not done:
                return "", ""
            else:
                self._start = -1
        if self._start < 0:
            return "", text
        if self._end < 0:
            self._end = text.find(CLOSE, max(self._start, self._searched - len(CLOSE)))
            self._searched = len(text)
        if self._end >= 0:
            return text[self._start : self._end], text[self._end + len(CLOSE) :]
        held = 0 if done else next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)
        return text[self._start : max(self._start, len(text) - held)], ""
