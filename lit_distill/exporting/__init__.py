"""A trained student for use: the Hugging Face folder that `fit` writes, and other engines with a proof of parity."""
