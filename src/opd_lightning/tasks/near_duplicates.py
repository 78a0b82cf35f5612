"""Questions that are nearly the same as an earlier one, found by MinHash (the `prompts` extra)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from opd_lightning.interfaces import Problem
from opd_lightning.tasks.overlap import question_words

SHINGLE_LENGTH = 3  # words
NUM_PERMUTATIONS = 128

Shingle = tuple[str, ...]


def find_near_duplicates(problems: Sequence[Problem], threshold: float) -> list[tuple[int, int]]:
    """Pairs (later, first) of positions: the later question is nearly the first, which is kept.

    Questions are compared as sets of runs of three words, in lower case. Runs that many questions share (more than 1 in
    20, and more than 3) are instructions and do not count. MinHash finds candidates in time linear in the text, and
    their similarity (common runs over all runs) is then computed exactly: none is found wrongly, a few near the
    threshold may be missed.

    Raises:
        ValueError: The package datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise ValueError(
            f"task.near_duplicates: needs datasketch ({error}). Install it: pip install 'opd-lightning[prompts]'."
        ) from error

    shingles = [_shingles(question_words(problem)) for problem in problems]
    most = max(3, len(problems) // 20)
    seen_in = Counter(shingle for own in shingles for shingle in own)
    own_shingles = [{shingle for shingle in own if seen_in[shingle] <= most} for own in shingles]
    index = MinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS)
    pairs: list[tuple[int, int]] = []
    for position, own in enumerate(own_shingles):
        if not own:  # nothing but instructions, or too short to be compared
            continue
        sketch = MinHash(num_perm=NUM_PERMUTATIONS, seed=0)
        sketch.update_batch(sorted(" ".join(shingle).encode() for shingle in own))
        likeliest = max(
            sorted(index.query(sketch)), key=lambda other: _similarity(own, own_shingles[other]), default=None
        )
        if likeliest is not None and _similarity(own, own_shingles[likeliest]) >= threshold:
            pairs.append((position, likeliest))
        else:
            index.insert(position, sketch)
    return pairs


def _shingles(words: Sequence[str]) -> set[Shingle]:
    return set(zip(*(words[start:] for start in range(SHINGLE_LENGTH)), strict=False))


def _similarity(left: set[Shingle], right: set[Shingle]) -> float:
    return len(left & right) / len(left | right)
