"""What a user may be handed: damaged checkpoints, broken configurations, broken data. One line each, or they work."""

import copy
import json
import os
import random
import time
import warnings

import pytest
import yaml
from campaign import IS_LONG
from test_campaign_runs import SETTINGS, same

from opd_lightning.tasks import DataSource, MathTask
from opd_lightning.training.checkpoints import read_checkpoint

pytest_plugins = ("campaign",)
pytestmark = pytest.mark.slow
NUM_CHECKPOINTS, NUM_CONFIGS, NUM_FILES = (2000, 1000, 5000) if IS_LONG else (150, 100, 250)
PAGE = 4096


def flipped(content, rng):
    for _ in range(rng.choice([1, 1, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def overwritten(content, rng):
    start, width = rng.randrange(len(content)), rng.choice([1, 16, PAGE])
    content[start : start + width] = rng.choice([bytes(width), rng.randbytes(width)])
    return content


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def moved(content, rng):
    a, b = rng.randrange(len(content)), rng.randrange(len(content))
    return content[:a] + content[b : b + PAGE] + content[a:]


DAMAGES = (flipped, overwritten, cut, moved)


def test_damaged_checkpoints(start, rng, report, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    words = ["fit", "--config", config, "--trainer.max_steps", 1, "--trainer.default_root_dir", tmp_path]
    assert start(words).status == 0
    path = next(tmp_path.rglob("last.ckpt")).resolve()
    good, expected = path.read_bytes(), read_checkpoint(path)
    expected = copy.deepcopy(expected)  # its tensors came from the file that is now damaged
    failures = []
    for number in range(NUM_CHECKPOINTS):
        damage = rng.choice(DAMAGES)
        path.write_bytes(damaged := bytes(damage(bytearray(good), rng)))
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            told = "\n" not in str(error) and path.name in str(error)
            failures += [] if told else [(number, damage.__name__, str(error))]
        else:
            if damaged != good and not same(content, expected):
                failures.append((number, damage.__name__, "was believed"))
    report("damaged checkpoints", NUM_CHECKPOINTS, failures)


# ------------------------------------------------------------------------------------------------------ configurations

CONFIG = copy.deepcopy(SETTINGS)
CONFIG["model"] |= {
    "objective": {
        "class_path": "DivergenceObjective",
        "init_args": {"support": {"class_path": "StudentTopK", "init_args": {"k": 4}}, "student_temperature": 1.0},
    },
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "betas": [0.9, 0.95]}},
    "lr_scheduler": {"class_path": "WarmupDecay", "init_args": {"warmup_steps": 1, "total_steps": 4}},
    "gradient_clip_norm": 1.0,
    "max_tokens_per_micro_batch": 256,
    "top_k_metrics": 4,
}
CONFIG["data"] |= {
    "engine": {"class_path": "HFEngine"},
    "selector": {"class_path": "Shuffled"},
    "sampling": {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop_ids": None},
    "rollouts_per_prompt": 2,
    "validation_samples": 1,
}
CONFIG["trainer"] |= {"devices": 1, "precision": "32-true", "log_every_n_steps": 1, "limit_val_batches": 1}
VALUES = [None, True, "", " ", "x", -1, 0, 0.5, float("nan"), float("inf"), -(10**30), 1e308, [], {}, [1], {"a": 1}]
VALUES += ["\x1b[31mred", "ü\u202e", "/dev/null", "/", "null", "1e3", "2024-01-01", "9" * 5000, "${HOME}", "../x"]
VALUES += [{"class_path": "os.system", "init_args": {"command": "touch pwned"}}, {"class_path": 3}, [[[[]]]], "a: b: c"]
YAML = [
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
    "!!python/object/apply:os.system ['touch pwned']\n",
    "? {a: b}\n: c\n",
    "<<: *nobody\n",
    "\t- x\n",
    "\x00\n",
    "model: [\n",
    "--- \n--- \n",
]


def places(settings, path=()):
    items = settings.items() if isinstance(settings, dict) else enumerate(settings)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(rng):
    """A configuration in which something is as nobody meant it."""
    settings = copy.deepcopy(CONFIG)
    for _ in range(rng.choice([1, 1, 1, 3])):
        *path, last = rng.choice(list(places(settings)))
        inner = settings
        for key in path:
            inner = inner[key]
        kind = rng.randrange(6)
        if kind == 0:
            del inner[last]
        elif kind == 1 and isinstance(inner, dict):
            inner[str(last) + rng.choice(["x", ".", "", " ", "ü"])] = inner.pop(last)
        else:
            inner[last] = rng.choice(VALUES)
    text = yaml.safe_dump(settings, allow_unicode=True)
    if rng.random() < 0.3:
        content = rng.choice((flipped, overwritten, cut))(bytearray(text.encode()), rng)
        return bytes(content)
    if rng.random() < 0.2:
        lines = text.splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines)), rng.choice(YAML))
        text = "".join(lines)
    return text.encode(rng.choice(["utf-8"] * 9 + ["utf-16"]), "surrogatepass")


def test_broken_configurations(start, rng, report, tmp_path):
    failures, config = [], tmp_path / "run.yaml"
    for number in range(NUM_CONFIGS):
        content = changed(random.Random(rng.random()))
        config.write_bytes(content)
        words = ["--trainer.max_steps", 1, "--trainer.default_root_dir", tmp_path / "runs"]
        ended = start(["fit", "--config", config, *words], memory=16 * 2**30)
        if not ended.is_told_in_one_line(0, 1, 2):
            (kept := tmp_path / f"{number}.yaml").write_bytes(content)
            failures.append((str(kept), ended.status, ended.said[-1500:]))
    report("broken configurations (fit)", NUM_CONFIGS, failures)
    assert not [path for place in (tmp_path, os.curdir) for path in os.listdir(place) if path == "pwned"]


# ---------------------------------------------------------------------------------------------------------------- data

ROWS = [{"question": f"{n}+{n}=", "answer": str(2 * n), "level": n} for n in range(8)]
CELLS = [None, "", " ", 3, 0.5, float("nan"), True, [], {}, ["x"], {"a": 1}, "\ud800", "\x00", "9" * 100_000, "{x}"]


def as_csv(rows):
    return "question,answer,level\n" + "".join(f"{row['question']},{row['answer']},{row['level']}\n" for row in rows)


def as_parquet(rows):
    import io

    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


WRITERS = {
    ".jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    ".json": lambda rows: json.dumps(rows).encode(),
    ".csv": lambda rows: as_csv(rows).encode(errors="surrogatepass"),
    ".parquet": as_parquet,
}


def broken_file(rng):
    ending, rows = rng.choice(list(WRITERS)), copy.deepcopy(ROWS)
    if ending != ".parquet" and rng.random() < 0.6:
        for _ in range(rng.choice([1, 8])):
            row = rng.choice(rows)
            row[rng.choice(list(row))] = rng.choice(CELLS)
        if ending != ".csv" and rng.random() < 0.3:
            rows[rng.randrange(8)] = rng.choice(CELLS)
    content = bytearray(WRITERS[ending](rows))
    if rng.random() < 0.6:
        content = rng.choice(DAMAGES)(content, rng)
    return ending, bytes(content)


def test_broken_data(rng, report, tmp_path):
    failures = []
    for number in range(NUM_FILES):
        ending, content = broken_file(rng)
        path = tmp_path / f"sums{number}{ending}"
        path.write_bytes(content)
        started = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # rows that are left out
                problems = MathTask(DataSource(str(path))).problems("train")
            sound = all(isinstance(message["content"], str) for each in problems for message in each.messages)
        except (ValueError, OSError) as error:
            sound = "sums" in str(error) or "source" in str(error)
            sound = sound and len(str(error)) < 3000 and type(error) in (ValueError, OSError)
            reason = f"{type(error).__name__}: {error}"
        except Exception as error:  # anything else would be a traceback
            sound, reason = False, repr(error)
        else:
            reason = "problems that are none"
        if not sound or time.process_time() - started > 20:
            failures.append((str(path), reason[:1500]))
    report("broken data files", NUM_FILES, failures)
