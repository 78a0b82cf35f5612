"""`opd-lightning diagnose`: the settings of a `fit`, measured instead of trained."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import rich
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning import Trainer

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher
from opd_lightning.commands.prompt_scores import describe_scores, score_prompts
from opd_lightning.commands.template_settings import TemplateSettings, make_templates
from opd_lightning.commands.whole_teacher import load_whole_teacher
from opd_lightning.diagnosis.examination import diagnose
from opd_lightning.diagnosis.measurements import Diagnosis
from opd_lightning.diagnosis.pair import Pair
from opd_lightning.diagnosis.report import as_json, make_report
from opd_lightning.diagnosis.template_choice import choose_template
from opd_lightning.interfaces import Problem, Split
from opd_lightning.randomness import derive_seed
from opd_lightning.reports.files import write_json, write_page, write_rows, write_yaml
from opd_lightning.reports.screen import show
from opd_lightning.rollouts.problem_sets import draw_problems, read_problems
from opd_lightning.rollouts.prompt_limits import check_context
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule
from opd_lightning.training.output_paths import check_folder

Parts = Literal["all", "prompts"]


class DiagnosingTrainer(Trainer):
    """Lightning's trainer, which can also measure a pair before it trains."""

    def diagnose(
        self,
        model: OPDModule,
        datamodule: OPDDataModule,
        num_prompts: PositiveInt = 64,
        num_samples: PositiveInt = 4,
        split: Split = "train",
        position_bins: PositiveInt = 8,
        gradient_rollouts: PositiveInt = 32,
        alignment_nodes: NonNegativeInt = 0,
        coverage_cells: NonNegativeInt = 0,
        templates: list[TemplateSettings] | None = None,
        parts: Parts = "all",
        output: str | None = None,
    ) -> None:
        """Measure student and teacher on some prompts without training, and say what to expect of them.

        Args:
            model: Student, teacher and objective.
            datamodule: Task, engine and sampling.
            num_prompts: Problems, drawn with the seed.
            num_samples: Answers per problem.
            split: Which problems.
            position_bins: Bins of response position.
            gradient_rollouts: Answers, one of each problem, whose gradients are taken.
            alignment_nodes: Answers, one of each problem, at one token of which the teacher's push is compared with
                what rewards would do; 32 continuations each.
            coverage_cells: Cells of the teacher's states (200 in arXiv 2609.04172); prompts.jsonl then says in which
                order prompts cover them fastest.
            templates: Other ways of putting the problems, to compare with the run's own; an empty list compares with
                the teacher's own chat template only.
            parts: "prompts" scores the prompts and leaves everything else out: for whole data sets; a command that was
                stopped goes on.
            output: Folder for diagnosis.json, diagnosis.html and prompts.jsonl (scores.jsonl with --parts prompts);
                null is `diagnosis` in trainer.default_root_dir.
        """
        folder = Path(output if output is not None else Path(self.default_root_dir, "diagnosis")).expanduser()
        check_folder("output", folder)
        pair = _pair_of(self, model, datamodule)
        problems = _problems_of(pair, datamodule, split, num_prompts)
        settings = _settings(pair, split, num_samples, self)
        if parts == "prompts":
            _check_left_out(templates=templates, alignment_nodes=alignment_nodes, coverage_cells=coverage_cells)
            score_prompts(pair, problems, folder / "scores.jsonl", settings, num_samples=num_samples, say=_say)
            show(describe_scores(folder / "scores.jsonl"), rich.get_console())
            return
        numbers = diagnose(
            pair,
            problems,
            num_samples=num_samples,
            num_bins=position_bins,
            num_gradient_rollouts=gradient_rollouts,
            num_alignment_nodes=alignment_nodes,
            num_cells=coverage_cells,
            templates=() if templates is None else make_templates(templates, pair, problems, split, folder),
            load_whole=load_whole_teacher if _is_quantised(pair) else None,
            say=_say,
        )
        _write(replace(numbers, settings=settings), folder)


def _check_left_out(**asked: Any) -> None:
    """Refuse what `--parts prompts` would leave out although it was asked for."""
    for name, value in asked.items():
        if value is not None and value != 0:
            raise ValueError(f"{name}: --parts prompts scores prompts and nothing else. Leave one of the two out.")


def _is_quantised(pair: Pair) -> bool:
    """Whether the teacher itself is, and scores tokens one by one."""
    teacher = pair.teacher
    return isinstance(teacher, HFTeacher) and teacher.quantization_config is not None and teacher.offer.full_vocabulary


def _say(words: str) -> None:
    print(f"diagnose: {words}", file=sys.stderr)


def _write(numbers: Diagnosis, folder: Path) -> None:
    """Show and write everything."""
    report = make_report(numbers)
    show(report, rich.get_console())
    write_json(folder / "diagnosis.json", as_json(numbers))
    write_page(folder / "diagnosis.html", report)
    write_rows(folder / "prompts.jsonl", numbers.prompts)
    written = ["diagnosis.json", "diagnosis.html", "prompts.jsonl"]
    if numbers.templates and (chosen := choose_template(numbers.templates)[0]).settings:
        write_yaml(folder / "template.yaml", chosen.settings)
        written.append("template.yaml")
    print("\n" + "\n".join(str(folder / name) for name in written))


def _pair_of(trainer: Trainer, module: OPDModule, data: OPDDataModule) -> Pair:
    if module.teacher is None:
        raise ValueError(
            "model.teacher: diagnose compares a student with its teacher, and there is none; for example"
            " {class_path: HFTeacher, init_args: {path: ...}}."
        )
    module.objective.check_sampling(data.sampling)
    data.engine.preflight(module.spec)
    if module.objective.needs_rollout_log_probs and not data.engine.knows_log_probs(data.sampling):
        raise ValueError(
            f"model.objective: {type(module.objective).__name__} needs the log-probabilities that answers were drawn"
            f" with, which {type(data.engine).__name__} does not know for this data.sampling. Set objective.importance:"
            " null."
        )
    module.teacher.preflight(module.spec)
    return Pair(
        student=module.spec,
        teacher=module.teacher,
        objective=module.objective,
        task=data.task,
        engine=data.engine,
        teacher_engine=HFEngine(),
        sampling=data.sampling,
        seed=data.seed,
        max_tokens=module.max_tokens_per_micro_batch,
        k=module.facts_k or 16,
        precision=trainer.precision_plugin.forward_context,
        device=trainer.strategy.root_device,
    )


def _problems_of(pair: Pair, data: OPDDataModule, split: Split, num_prompts: int) -> list[Problem]:
    limits = (pair.student.context_length, data.engine.context_length or sys.maxsize)
    problems, longest = read_problems(
        data.task,
        split,
        pair.student.tokenizer,
        data.sampling,
        setting="data.sampling",
        context=min(limits),
        max_prompt_tokens=data.max_prompt_tokens,
        drop=data.drop_long_prompts,
    )
    check_context("model.teacher: it reads", pair.teacher.context_length, longest, data.sampling)
    if num_prompts > len(problems):
        raise ValueError(
            f"num_prompts: {num_prompts} prompts were asked for, but the {split} split has {len(problems)}. Set"
            f" --num_prompts {len(problems)} or less."
        )
    return draw_problems(problems, num_prompts, derive_seed(data.seed, "diagnose", "problems"))


def _settings(pair: Pair, split: Split, num_samples: int, trainer: Trainer) -> dict[str, Any]:
    return {
        "student": pair.student.path if isinstance(pair.student, HFStudent) else type(pair.student).__name__,
        "teacher": pair.teacher.source.path if isinstance(pair.teacher, HFTeacher) else type(pair.teacher).__name__,
        "objective": type(pair.objective).__name__,
        "task": type(pair.task).__name__,
        "split": split,
        "answers per prompt": num_samples,
        "sampling": str(pair.sampling),
        "seed": pair.seed,
        "precision": str(trainer.precision),
    }
