"""fimkit: Fisher information matrices of PyTorch models, and their inverses times vectors."""

__version__ = "0.1.0"
