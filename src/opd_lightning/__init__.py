"""On-policy distillation with PyTorch Lightning, and EffOPD weight extrapolation for any trainer."""

__version__ = "0.1.0"
