"""Data modules."""

from lit_distill.data.base import RationaleDataModule
from lit_distill.data.cqa import CQADataModule
from lit_distill.data.jsonl import JSONLDataModule
from lit_distill.data.nli import ANLIDataModule, ESNLIDataModule
from lit_distill.data.svamp import SVAMPDataModule
from lit_distill.data.toy import ToyDataModule

__all__ = [
    "ANLIDataModule",
    "CQADataModule",
    "ESNLIDataModule",
    "JSONLDataModule",
    "RationaleDataModule",
    "SVAMPDataModule",
    "ToyDataModule",
]
