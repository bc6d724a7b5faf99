"""Data modules."""

from lit_distill.data.base import RationaleDataModule
from lit_distill.data.corpus import CorpusDataModule
from lit_distill.data.jsonl import JSONLDataModule
from lit_distill.data.paper import ANLIDataModule, CQADataModule, ESNLIDataModule, SVAMPDataModule
from lit_distill.data.toy import ToyDataModule

__all__ = [
    "ANLIDataModule",
    "CQADataModule",
    "CorpusDataModule",
    "ESNLIDataModule",
    "JSONLDataModule",
    "RationaleDataModule",
    "SVAMPDataModule",
    "ToyDataModule",
]
