"""What `opd-lightning diagnose` says of pairs whose truth is known by construction; prints a Markdown table.

    python benchmarks/diagnose_calibration.py --seeds 3 --num_prompts 32         # pairs made of the sandbox models
    python benchmarks/diagnose_calibration.py --seeds 2 --num_prompts 16 --zoo   # pairs whose outcome was measured

The first pairs are made of the two sandbox models, without training: copies, exchanged roles, weights between the two
(alpha = 0 is the student, 1 the teacher), and weights with noise. Those of the zoo were trained by phenomenology.py,
and what is right is what that showed (docs/phenomenology.md). Each pair is diagnosed with several seeds, which draw
other prompts and other answers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from phenomenology import ZOO, imitate
from phenomenology_arms import PHENOMENA
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning import sandbox
from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher
from opd_lightning.diagnosis.examination import diagnose
from opd_lightning.diagnosis.pair import Pair
from opd_lightning.diagnosis.verdicts import verdicts
from opd_lightning.interfaces import Sampling, Task
from opd_lightning.objectives import DivergenceObjective
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.problem_sets import draw_problems
from opd_lightning.sandbox.make_zoo import RECIPES, make
from opd_lightning.sandbox.notations import NotationTask
from opd_lightning.tasks import ArithmeticTask

FOLDER = Path(__file__).parent / "results"
NOTHING_NEW = "The teacher adds nothing new here"
PAIRS = {  # (student, teacher): the verdict that is right by construction; None where nobody can say beforehand
    "student from teacher": ("student", "teacher", "Distil"),
    "student from itself": ("student", "student", NOTHING_NEW),
    "teacher from itself": ("teacher", "teacher", NOTHING_NEW),
    "teacher from student": ("teacher", "student", NOTHING_NEW),
    "student from alpha 0.5": ("student", "mix 0.5", None),
    "alpha 0.5 from teacher": ("mix 0.5", "teacher", None),
    "alpha 0.9 from teacher": ("mix 0.9", "teacher", None),
    "noisy student from teacher": ("noisy", "teacher", None),
    "student from noisy student": ("student", "noisy", NOTHING_NEW),
}
COLD_STARTED = "other-notation imitated"
ZOO_PAIRS = {  # likewise, by what training showed
    "student from teacher": ("student", "teacher", "Distil"),
    "student from half-careful": ("student", "half-careful", "Distil"),
    "student from other-notation": ("student", "other-notation", "Distil"),
    "student imitating other-notation, from it": (COLD_STARTED, "other-notation", None),
    "diffuse-student from teacher": ("diffuse-student", "teacher", "Distil"),
    "small-student from student": ("small-student", "student", None),
    "small-student from teacher": ("small-student", "teacher", "Distil"),
    "teacher from student": ("teacher", "student", NOTHING_NEW),
}


def zoo_models(folder: Path) -> dict[str, Path]:
    """Folders of the models of the zoo by name, with a student that has been through the cold start of seed 0."""
    make(ZOO, names=sorted({name for pair in ZOO_PAIRS.values() for name in pair[:2]} & set(RECIPES)))
    imitate(PHENOMENA["cold_start"]["other notation, after imitation"], 0, folder / "imitated")
    paths = {name: ZOO / name for name in RECIPES} | {COLD_STARTED: folder / "imitated"}
    return paths | {"student": sandbox.student_path(), "teacher": sandbox.teacher_path()}


def headline(words: Sequence[str]) -> str:
    """The verdict that says whether to distil."""
    return next(each for each in words if not each.startswith("Most answers are cut"))


def make_models(folder: Path, noise: float) -> dict[str, Path]:
    """Folders of the models by name."""
    paths = {"student": sandbox.student_path(), "teacher": sandbox.teacher_path()}
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths.values())
    generator = torch.Generator().manual_seed(0)
    made = {f"mix {alpha}": {n: torch.lerp(w, teacher[n], alpha) for n, w in student.items()} for alpha in (0.5, 0.9)}
    made["noisy"] = {n: w + noise * w.std() * torch.randn(w.shape, generator=generator) for n, w in student.items()}
    for name, weights in made.items():
        model = AutoModelForCausalLM.from_pretrained(paths["student"])
        model.load_state_dict(weights)
        paths[name] = folder / name.replace(" ", "_")
        model.save_pretrained(paths[name])
        AutoTokenizer.from_pretrained(sandbox.student_path()).save_pretrained(paths[name])
    return paths


def examine(student: Path, teacher: Path, task: Task, seed: int, num_prompts: int) -> dict[str, Any]:
    """Verdicts and the numbers that they read."""
    pair = Pair(
        HFStudent(str(student)),
        HFTeacher(str(teacher), dtype="float32"),
        DivergenceObjective(),
        task,
        HFEngine(),
        HFEngine(),
        Sampling(max_new_tokens=72),
        seed,
        max_tokens=4096,
    )
    pair.teacher.preflight(pair.student)
    problems = draw_problems(pair.task.problems("train"), num_prompts, derive_seed(seed, "diagnose", "problems"))
    found = diagnose(pair, problems, num_gradient_rollouts=1)
    gain = found.continuations[0].gain
    gains = {each.depth: (round(each.gain.value, 4), round(each.gain.error or 0.0, 4)) for each in found.continuations}
    return {
        "verdicts": [each.words for each in verdicts(found)],
        "overlap_ratio": found.facts["overlap_ratio"],
        "student_entropy": found.facts["student_entropy"],
        "overlap_mass_teacher": found.facts["overlap_mass_teacher"],
        "reverse_kl": found.facts["reverse_kl"],
        "gain": gain.value,
        "gain_error": gain.error,
        "gains": gains,
        "reward_auroc": found.reward_auroc,
        "mixed_prompts": found.student.mixed_prompts,
    }


def main() -> None:
    """Diagnose every pair with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", action="store_true", help="diagnose the pairs of the zoo")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--num_prompts", type=int, default=64)
    parser.add_argument("--noise", type=float, default=0.5)
    options = parser.parse_args()
    output = FOLDER / f"diagnose_{'zoo' if options.zoo else 'calibration'}_cpu-2core.json"
    pairs, task = (ZOO_PAIRS, NotationTask(levels=(1, 2))) if options.zoo else (PAIRS, ArithmeticTask())
    results: dict[str, list[dict[str, Any]]] = {}
    num_right, num_known = 0, 0
    print("| pair | right by construction | said (of seeds) | overlap | entropy | reverse KL | gain |\n|" + "---|" * 7)
    with tempfile.TemporaryDirectory() as folder:
        paths = zoo_models(Path(folder)) if options.zoo else make_models(Path(folder), options.noise)
        for name, (student, teacher, right) in pairs.items():
            runs = [
                examine(paths[student], paths[teacher], task, seed, options.num_prompts)
                for seed in range(options.seeds)
            ]
            if right is not None:
                num_known += len(runs)
                num_right += sum(headline(run["verdicts"]).startswith(right) for run in runs)
            results[name] = runs
            said = [words for run in runs for words in run["verdicts"]]
            counts = "; ".join(f"{words} ({said.count(words)})" for words in dict.fromkeys(said))
            means = [
                sum(run[key] for run in runs) / len(runs)
                for key in ("overlap_ratio", "student_entropy", "reverse_kl", "gain")
            ]
            print(
                f"| {name} | {right or '?'} | {counts} | " + " | ".join(f"{mean:.3g}" for mean in means) + " |",
                flush=True,
            )
            output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{num_right} of {num_known} diagnoses whose right answer is known were right.")


if __name__ == "__main__":
    main()
