"""Tokens that a run has read."""


class TokenCount:
    """Source and target tokens that a rank has read; those of an optimizer step count once it is complete.

    Args:
        before: read in earlier parts of the run.
    """

    def __init__(self, before: int = 0) -> None:
        self._before = before
        self._step, self._tokens = 0, 0  # the optimizer step that was opened last, and its tokens

    def open(self, step: int, tokens: int) -> None:
        """Begin an optimizer step, after ``step`` complete ones."""
        self._before, self._step, self._tokens = self.total(step), step, tokens

    def total(self, step: float) -> int:
        """The tokens of ``step`` complete optimizer steps."""
        return self._before + (self._tokens if step > self._step else 0)
