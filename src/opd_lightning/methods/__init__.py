"""Published methods, one file each, behind the seams of `opd_lightning.interfaces`.

Each comes with a configuration of its name (`--config @quickstart --config @methods/vopd`), a page in docs/methods and
tests/methods/test_<name>.py; tests/methods/test_every_method.py holds all of them to the same promises.
"""

from opd_lightning.methods.vopd import KLBaseline

__all__ = ["KLBaseline"]
