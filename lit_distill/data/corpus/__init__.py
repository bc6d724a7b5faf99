"""A corpus of texts to read before any task."""

from lit_distill.data.corpus.datamodule import CorpusDataModule

__all__ = ["CorpusDataModule"]
