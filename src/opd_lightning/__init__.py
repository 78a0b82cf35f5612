"""On-policy distillation with PyTorch Lightning, and EffOPD weight extrapolation for any trainer.

Every public name is here: modules, callbacks, the classes a configuration may name, the seams and the words they speak;
`__init__.pyi` lists them. They are loaded when they are first asked for: `EffOPD` needs Lightning, `EffOPDOptimizer`
only torch, and transformers is imported with the first `HF...` name. Anything not listed there may change without
notice (CONTRIBUTING.md).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
