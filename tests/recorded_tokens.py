"""Records of tokens by hand, for pages: values that can be recomputed from place, answer and step."""

from __future__ import annotations

from opd_lightning.reports.token_records import VALUES, write_record

HOSTILE = [
    "</script>",
    "<img src=x onerror=alert(1)>",
    "\x1b[2J",
    "\u202e",
    "\n",
    " ",
    "\t",
    "",
    "<|im_end|>",
    "&amp;",
    "end.\n",
]
HEADER = {"teacher": "HFTeacher", "gives_vocabulary": True, "objective": "DivergenceObjective", "facts_k": 16}


def divergence(place: int, answer: int, step: int) -> float:
    """One peak of 3 nats per answer at place 2, smaller in later steps; 0.02 elsewhere."""
    return (3.0 - 0.5 * answer if place == 2 else 0.02) / (1 + step)


def row(step, answer, texts, kind="fixed", lists_only=False, **columns):
    places = range(len(texts))
    ids = [100 + len(text) if text in HOSTILE else 10 + place for place, text in enumerate(texts)]
    known = ("sampled_log_ratio", "student_log_prob") if lists_only else set(VALUES) - {"token_weight", "advantage"}
    values = dict.fromkeys(VALUES) | {name: [divergence(p, answer, step) for p in places] for name in known}
    values["sampled_log_ratio"] = [-1.5 if place == 1 else 0.05 for place in places]
    top = {
        "ids": [[i, 7] for i in ids],
        "texts": [[t, "seven"] for t in texts],
        "log_probs": [[-0.5, -1.2] for _ in ids],
    }
    return {
        "step": step,
        "kind": kind,
        "uid": f"problem/{answer}",
        "source": ("sums", "words")[answer % 2],
        "seed": answer,
        "reference": "42",
        "reward": (1.0, 0.0, None)[answer % 3],
        "truncated": answer == 1,
        "num_tokens": len(texts),
        "staleness": None,
        "student_prompt": f"<|user|>question {answer} </script><|assistant|>",
        "teacher_prompt": f"[INST] question {answer} [/INST]" if answer == 0 else None,
        "response": "".join(texts),
        "prompt_ids": [1, answer] if kind == "fixed" else [1, answer, step],
        "token_ids": ids,
        "texts": list(texts),
        "is_special": [text == "<|im_end|>" for text in texts],
        "student_wrote": [True] * len(texts),
        **values,
        **{f"{who}_top_{name}": part for who in ("student", "teacher") for name, part in top.items()},
    } | columns


def write_records(folder, steps=(0, 10), num_answers=4, texts=None, header=HEADER, **columns):
    """Fixed answers of some tokens in every step, and one own answer of each step."""
    texts = texts or ["so ", "the", " sum", "\n", "is ", "42", "<|im_end|>"]
    for step in steps:
        rows = [row(step, answer, [*texts, f"+{answer}"], **columns) for answer in range(num_answers)]
        rows.append(row(step, 4, ["own ", "words", f" {step}"], kind="own", **columns))
        write_record(folder, step, rows, header)
    return folder
