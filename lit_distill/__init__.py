"""Distilling step-by-step on PyTorch Lightning."""

__version__ = "0.1.0"
