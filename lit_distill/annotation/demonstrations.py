"""Which demonstrations are shown with a row: always the same, or those whose inputs are most like the row's."""

from collections.abc import Callable, Sequence

from lit_distill.errors import UserError
from lit_distill.tasks import Row

Choose = Callable[[Row], Sequence[Row]]
"""The demonstrations to show with a row, in order."""


def fixed(demonstrations: Sequence[Row], count: int | None) -> Choose:
    """The first of them, whatever the row; a row is never shown itself.

    Args:
        demonstrations: to choose from.
        count: how many; all if not given.
    """
    return lambda example: [one for one in demonstrations if one.input != example.input][:count]


def nearest(demonstrations: Sequence[Row], count: int) -> Choose:
    """Those with the most similar inputs, the most similar last, next to the question (Liu et al. 2022, 2101.06804).

    Similarity is the cosine of TF-IDF vectors over words and pairs of words.

    Args:
        demonstrations: to choose from.
        count: how many.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError('nearest_demonstrations needs scikit-learn: pip install "lit_distill[nearest]"') from error
    words = r"(?u)\b\w+\b"  # also those of one letter
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=words)
    try:
        # rows have length 1, so that a product is a cosine
        known = vectorizer.fit_transform([one.input for one in demonstrations])
    except ValueError as error:
        raise UserError(f"nearest_demonstrations: the demonstrations' inputs hold no words ({error})") from error

    def choose(example: Row) -> list[Row]:
        likeness = (known @ vectorizer.transform([example.input]).T).toarray()[:, 0]
        order = sorted(range(len(demonstrations)), key=lambda position: (-likeness[position], position))
        chosen = [demonstrations[position] for position in order if demonstrations[position].input != example.input]
        return chosen[:count][::-1]

    return choose
