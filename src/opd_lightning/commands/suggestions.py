"""Which name was meant: `Adamw` is AdamW, `modle` is model, `warm_up_steps` is warmup_steps."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_MOVED = {  # settings that have another place now
    "updates_per_batch": "Set data.source: {class_path: Reuse, init_args: {passes: 1, mini_batches: ...}} instead.",
}


def nearest(name: str, names: Iterable[str]) -> str:
    """The sentence that suggests a name, with a blank before it; empty when none comes close.

    Case, underscores and hyphens count for nothing: a name that differs only there is taken first. Of a setting that
    has moved it says where to.
    """
    if moved := _MOVED.get(name.rpartition(".")[2]):
        return f" {moved}"
    known = sorted(set(names))
    plain: dict[str, str] = {}
    for other in known:
        plain.setdefault(_plain(other), other)
    near = [plain[match] for match in get_close_matches(_plain(name), plain, n=1, cutoff=0.7)]
    near = near or [other for other in known if other.startswith(name)]
    near = near or [other for other in known if _plain(other).endswith(f".{_plain(name).removeprefix('--')}")]
    return f" Did you mean {near[0]}?" if near else ""


def _plain(name: str) -> str:
    dashes = "--" if name.startswith("--") else ""
    return dashes + name.removeprefix("--").lower().replace("_", "").replace("-", "")
