"""Models through Hugging Face: the only room that imports transformers and peft.

`HFStudent` (what is trained), `HFEngine` (rollouts from the live student), `HFTeacher` (scores).
"""

from opd_lightning.backends.hf.adapters import LoraSettings
from opd_lightning.backends.hf.cross_tokenizer import CrossTokenizerTeacher
from opd_lightning.backends.hf.engine import HFEngine
from opd_lightning.backends.hf.preflight import check_compatibility
from opd_lightning.backends.hf.student import HFStudent
from opd_lightning.backends.hf.teacher import HFTeacher
from opd_lightning.backends.hf.tokenizer import HFTokenizer

__all__ = [
    "CrossTokenizerTeacher",
    "HFEngine",
    "HFStudent",
    "HFTeacher",
    "HFTokenizer",
    "LoraSettings",
    "check_compatibility",
]
