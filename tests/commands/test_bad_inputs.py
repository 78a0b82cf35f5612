"""Every mistake gets one clear line from the real command, before any weight is loaded where that is possible."""

import json
import re
import resource
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer
from safetensors.torch import load_file, save_file

from opd_lightning import sandbox
from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.commands import cli
from opd_lightning.training.checkpoints import WholeCheckpoints, read_checkpoint

SANDBOX = Path(sandbox.__file__).parent
ABSENT = object()
STUDENT, TEACHER, TASK = "model.student.init_args", "model.teacher.init_args", "data.task.init_args"
ROWS = '{"question": "1+1=", "answer": "2", "level": 1}\n{"question": "2+2=", "answer": "4", "level": 2}\n'


# --------------------------------------------------------------------------------- what the cases are made with


def change(settings, name, value):
    """Set, add or (ABSENT) remove a setting by its dotted name."""
    *path, last = name.split(".")
    for key in path:
        settings = settings.setdefault(key, {})
    if value is ABSENT:
        settings.pop(last)
    else:
        settings[last] = value


def write_config(folder, changes):
    settings = {
        "model": {
            "student": {"class_path": "HFStudent", "init_args": {"path": "sandbox:student"}},
            "teacher": {"class_path": "HFTeacher", "init_args": {"path": "sandbox:teacher", "dtype": "float32"}},
        },
        "data": {
            "task": {"class_path": "ArithmeticTask", "init_args": {"num_train": 8, "num_validation": 4, "num_test": 4}},
            "sampling": {"max_new_tokens": 8},
            "prompts_per_step": 4,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": str(folder),
        },
    }
    for name, value in changes.items():
        change(settings, name, value)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def file(name, content):
    """A file that the case writes; returns its path."""

    def write(at):
        path = at.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def math(name, content=None, **options):
    """A MathTask that trains and validates on the file."""

    def write(at):
        path = name if content is None else file(name, content)(at)
        return {
            "class_path": "MathTask",
            "init_args": {"train": {"path": path, **options}, "validation": {"path": path}},
        }

    return {"data.task": write}


def model(role, weights=False, without=(), template=None, **edits):
    """A copy of a sandbox model with edited JSON files: `config={"vocab_size": 10}`; without weights unless asked."""

    def write(at):
        folder = at.folder / role
        shutil.copytree(SANDBOX / role, folder)
        for name in (*without, *(() if weights else ("model.safetensors",))):
            (folder / name).unlink()
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        for name, changes in edits.items():
            content = json.loads((folder / f"{name}.json").read_text())
            for key, value in changes.items():
                change(content, key, value)
            (folder / f"{name}.json").write_text(json.dumps(content))
        return str(folder)

    return write


def cut_short(role):
    def write(at):
        path = Path(model(role, weights=True)(at))
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[:-1000])
        return str(path)

    return write


def with_nan(at):
    path = Path(model("student", weights=True)(at))
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def folder(name):
    return lambda at: str((at.folder / name).mkdir() or at.folder / name)


def objective(**options):
    return {"model.objective": {"class_path": "DivergenceObjective", "init_args": options}}


def of_class(class_path, **options):
    return {"class_path": class_path, "init_args": options}


def the_checkpoint(at):
    return str(at.checkpoint)


def edited_checkpoint(edit):
    """A copy of the good checkpoint with something changed, or another object saved in its place."""

    def write(at):
        content = torch.load(at.checkpoint, weights_only=True)
        torch.save(edit(content) or content, at.folder / "edited.ckpt")
        return str(at.folder / "edited.ckpt")

    return write


def half_of_the_checkpoint(at):
    content = at.checkpoint.read_bytes()
    return file("half.ckpt", content[: len(content) // 2])(at)


@dataclass
class Place:
    folder: Path
    checkpoint: Path


@dataclass
class Case:
    """Arguments and values of `changes` may be functions of the place, which make the files they name."""

    id: str
    message: str
    changes: dict = field(default_factory=dict)
    arguments: tuple = ()
    command: str = "fit"
    loaded: tuple = ()
    status: int = 2
    num_processes: int = 1


def bad(id, message, changes=None, *arguments, **options):
    return Case(id, message, changes or {}, arguments, **options)


def resume(id, message, path, changes=None, **options):
    return bad(id, message, {"trainer.max_steps": 2} | (changes or {}), "--ckpt_path", path, **options)


def export(id, message, path, output, *arguments, **options):
    return Case(id, message, {}, ("--ckpt_path", path, "--output", output, *arguments), "export", **options)


def validate(id, message, changes, **options):
    return bad(id, message, changes, command="validate", **options)


EMPTY_CONFIG = "expected settings such as `model:`"

CASES = [
    # keys
    bad(
        "typo in YAML",
        r"no setting data.promts_per_step. Did you mean data.prompts_per_step\?",
        {"data.promts_per_step": 3},
    ),
    bad(
        "typo under trainer", r"no setting trainer.max_stps. Did you mean trainer.max_steps\?", {"trainer.max_stps": 3}
    ),
    bad(
        "typo in arguments",
        r"HFStudent has no argument pth. Did you mean path\? It takes: path, lora,",
        {f"{STUDENT}.pth": "x"},
    ),
    bad(
        "typo three levels down", r"Source has no argument limt. Did you mean limit\?", math("rows.jsonl", ROWS, limt=3)
    ),
    bad("a list for settings", r"data.sampling: expected settings by name, got \[\]", {"data.sampling": []}),
    bad("typo at the top", r"no setting modell.student", {"modell.student": "x"}),
    bad(
        "typo in a flag",
        r"no option --trainer.max_stps. Did you mean --trainer.max_steps\?",
        {},
        "--trainer.max_stps=3",
    ),
    bad(
        "abbreviated flag",
        r"no option --data.prompts. Did you mean --data.prompts_per_step\?",
        {},
        "--data.prompts",
        "3",
    ),
    bad(
        "letters swapped in a flag",
        r"no option --modle.student.path. Did you mean --model.student\?",
        {},
        "--modle.student.path=x",
    ),
    bad("optimiser at the top", r"no option --optimizer. Did you mean --model.optimizer\?", {}, "--optimizer", "SGD"),
    bad(
        "unknown command",
        r"no command fitt. Did you mean fit\? Expected one of fit, validate, test, predict, diagnose, plan, rollout",
        command="fitt",
    ),
    bad(
        "null for a number",
        r"model.max_tokens_per_micro_batch: expected int, got null. Leave it out for 16384",
        {"model.max_tokens_per_micro_batch": None},
    ),
    bad(
        "null for a number of a class",
        r"data.task.num_train: expected int, got null. Leave it out for",
        {f"{TASK}.num_train": None},
    ),
    bad(
        "null for a number of a dataclass",
        r"data.sampling.top_k: expected int, got null. Leave it out for 0",
        {"data.sampling.top_k": None},
    ),
    bad(
        "null for a mapping to anything, in one of several sources",
        r"data.task.train.0.where: expected dict\[str, Any\], got null. Leave it out for {}\.",
        {"data.task": of_class("MathTask", train=[{"path": "t.jsonl", "where": None}])},
    ),
    bad(
        "null for a setting of a callback",
        r"trainer.callbacks.0.schedule: expected .*, got null. Leave it out for",
        {"trainer.callbacks": [of_class("EffOPD", score=of_class("TeacherKL"), schedule=None)]},
    ),
    bad(
        "unknown teacher",
        r"model.teacher: there is no class HFTeachr here; expected .* Did you mean HFTeacher\?",
        {"model.teacher": of_class("HFTeachr")},
    ),
    bad(
        "unknown selector",
        r"data.selector: .* no class Shufled .* one of DifficultyPool, .*Did you mean Shuffled\?",
        {"data.selector": "Shufled"},
    ),
    bad(
        "unknown divergence",
        r"divergence: there is no class ReversKL here; expected one of .*ForwardKL,.* Did you mean ReverseKL\?",
        objective(divergence="ReversKL"),
    ),
    bad(
        "unknown optimiser",
        r"model.optimizer: there is no class AdamWW .*Did you mean AdamW\?",
        {"model.optimizer": of_class("AdamWW")},
    ),
    bad(
        "unknown optimiser of a module",
        r"model.optimizer: there is no torch.optim.AdamWW. Did you mean AdamW\?$",
        {"model.optimizer": of_class("torch.optim.AdamWW")},
    ),
    bad(
        "unknown callback",
        r"no class PrintSample here.* Did you mean PrintSamples\?",
        {"trainer.callbacks": [of_class("PrintSample")]},
    ),
    bad(
        "class of another seam",
        r"model.teacher: there is no class HFStudent here",
        {"model.teacher": of_class("HFStudent", path="x")},
    ),
    bad(
        "module not installed",
        r"model.teacher: Teacher: No module named 'my_package'",
        {"model.teacher": of_class("my_package.Teacher")},
    ),
    bad("words for a number", r"data.prompts_per_step: expected int, got many", {"data.prompts_per_step": "many"}),
    bad(
        "unknown support",
        r"support: there is no class Everything here; expected one of FullVocabulary, Intersection, ",
        objective(support="Everything"),
    ),
    bad("seed that is no number", r"seed_everything: expected an integer", {"seed_everything": True}),
    bad("no student", r"required: model.student$", {"model.student": ABSENT}),
    bad("no teacher", r"model.teacher: DivergenceObjective needs a teacher, for example", {"model.teacher": ABSENT}),
    bad("class of another case", r"no class Adamw here.* Did you mean AdamW\?", {"model.optimizer": of_class("Adamw")}),
    bad("letters swapped", r"no setting modle.student. Did you mean model.student\?", {"modle.student": "x"}),
    bad(
        "underscore too many",
        r"WarmupDecay has no argument warm_up_steps. Did you mean warmup_steps\? It takes: warmup_steps, decay,",
        {"model.lr_scheduler": of_class("WarmupDecay", warm_up_steps=3)},
    ),
    bad("no class at all", r"trainer.callbacks: expected a class, as in .*; got", {"trainer.callbacks": [3]}),
    bad(
        "seed below zero", r"seed_everything: expected an integer from 0 to 4294967295, got -1", {"seed_everything": -1}
    ),
    bad("no text", r"'x\\udcff': expected UTF-8 text on the command line", {}, "--data.task", "x\udcff"),
    # files
    bad(
        "no shipped config", r"no shipped configuration quikstart. Did you mean quickstart\?", {}, "--config=@quikstart"
    ),
    bad("no config file", r"File does not exist: '.*absent.yaml'", {}, "--config", "absent.yaml"),
    bad(
        "config that is not YAML",
        rf"broken.yaml: {EMPTY_CONFIG}.*line 1",
        {},
        "--config",
        file("broken.yaml", "model: [1, 2"),
    ),
    bad("empty config", rf"empty.yaml: {EMPTY_CONFIG}", {}, "--config", file("empty.yaml", "")),
    bad("no data file", r"absent.jsonl does not exist. Relative paths start from", math("absent.jsonl")),
    bad(
        "malformed line",
        r"rows.jsonl, line 3: expected one JSON object",
        math("rows.jsonl", ROWS + '{"question": "x", \n', strict=True),
    ),
    bad(
        "not UTF-8",
        r"rows.jsonl, line 3: expected UTF-8 text, found byte 0xff",
        math("rows.jsonl", ROWS.encode() + b'"\xff"'),
    ),
    bad("empty data file", r"rows.jsonl is empty: expected at least one row", math("rows.jsonl", "")),
    bad(
        "unknown file type",
        r"rows.txt: expected a file ending in .jsonl, .json, .parquet, .csv",
        math("rows.txt", ROWS),
    ),
    bad(
        "short CSV row",
        r"rows.csv, line 3: expected 2 cells, as in the header",
        math("rows.csv", "question,answer\n1,2\n3\n", strict=True),
    ),
    bad("not parquet", r"rows.parquet: expected a parquet file", math("rows.parquet", "question,answer\n1,2\n")),
    bad(
        "log folder is a file",
        r"trainer.default_root_dir: '.*taken' cannot be a folder, since '.*taken' is a file",
        {"trainer.default_root_dir": file("taken", "")},
    ),
    bad(
        "log folder that cannot be written",
        r"trainer.default_root_dir: nothing can be written to '/proc'",
        {"trainer.default_root_dir": "/proc/runs"},
    ),
    bad(
        "logger's folder is a file",
        r"trainer.logger.save_dir: '.*taken/logs' cannot be a folder",
        {"trainer.logger": lambda at: of_class("CSVLogger", save_dir=file("taken", "")(at) + "/logs")},
    ),
    bad(
        "answers over a folder",
        r"AnswersWriter.path: expected a file to write, but '.*answers' is a folder",
        {"trainer.callbacks": lambda at: [of_class("AnswersWriter", path=folder("answers")(at))]},
        command="predict",
    ),
    # columns and sets
    bad(
        "no question column",
        r"line 1: there is no column 'question'; available: problem, .*with `question`, beside the path in data.task",
        math("rows.jsonl", ROWS.replace("question", "problem")),
    ),
    bad(
        "no answer column",
        r"line 1: there is no column 'answer'; available: question, solution,",
        math("rows.jsonl", ROWS.replace("answer", "solution")),
    ),
    bad(
        "empty answer",
        r"line 2, column 'answer': the reference answer is empty",
        math("rows.jsonl", ROWS.replace('"4"', '""'), strict=True),
    ),
    bad(
        "nothing passes the filter",
        r"the filters leave none of the 2 rows; column 'level' holds 1 \(int\), 2 \(int\)",
        math("rows.jsonl", ROWS, where={"level": 7}),
    ),
    bad(
        "filter on no column",
        r"no column 'levl' \(available: question, answer, level\)",
        math("rows.jsonl", ROWS, where={"levl": 1}),
    ),
    bad("no training problems", r"ArithmeticTask has no problems in its 'train' split", {f"{TASK}.num_train": 0}),
    bad(
        "no validation problems",
        r"no problems in its 'validation' split. .*limit_val_batches: 0",
        {f"{TASK}.num_validation": 0},
    ),
    bad(
        "all problems reserved", r"data.num_reserved=8 leaves none of the 8 training problems", {"data.num_reserved": 8}
    ),
    bad(
        "generating ahead with the live student",
        r"data.source: OneStepAhead needs .* this HFEngine shares weights .*Use VLLMServerEngine",
        {"data.source": "OneStepAhead"},
    ),
    bad(
        "selector keeps nothing",
        r"where={'level': 9}.* leave none of the 8 problems. Columns: level",
        {"data.selector": of_class("Filtered", where={"level": 9})},
    ),
    bad(
        "mixture of an unknown source",
        r"'gsm8k' is not a source. The data has the sources: arithmetic",
        {"data.selector": of_class("Mixture", weights={"gsm8k": 1})},
    ),
    bad(
        "pool upside down",
        r"selector.low: expected a number below selector.high=0.1, got 0.9.$",
        {"data.selector": of_class("DifficultyPool", low=0.9, high=0.1)},
    ),
    # tokenizers and templates
    bad(
        "another vocabulary",
        r"tokenizers of the student and of .* differ in 2 tokens: '!' is id 6 .* and id 7 for the teacher",
        {f"{TEACHER}.path": model("teacher", tokenizer={"model.vocab.!": 7, 'model.vocab."': 6})},
    ),
    bad(
        "no tokenizer",
        r"student.path: no tokenizer in",
        {f"{STUDENT}.path": model("student", without=["tokenizer.json", "tokenizer_config.json"])},
    ),
    bad(
        "no chat template",
        r"student.chat_template: the tokenizer has no chat template",
        {f"{STUDENT}.path": model("student", without=["chat_template.jinja"])},
    ),
    bad(
        "template that raises",
        r"student.chat_template: .* failed: no such role",
        {f"{STUDENT}.path": model("student", template="{{ raise_exception('no such role') }}")},
    ),
    bad(
        "template that is cut short",
        r"student.chat_template: .* failed: Unexpected end of template",
        {f"{STUDENT}.path": model("student", template="{% for m in messages %}")},
    ),
    bad(
        "template that says nothing",
        r"1 messages render to nothing",
        {f"{STUDENT}.path": model("student", template="{# #}")},
    ),
    bad(
        "template file absent",
        r"'absent.jinja' is neither a template .* nor an existing file",
        {f"{STUDENT}.chat_template": "absent.jinja"},
    ),
    bad(
        "fewer rows than ids",
        r"ids up to 261, but the model has only 10 rows",
        {f"{STUDENT}.path": model("student", config={"vocab_size": 10})},
    ),
    bad(
        "teacher ends differently",
        r"the teacher .* ends its answers with \['\$'\].* Set student.extra_stop_tokens",
        {f"{TEACHER}.path": model("teacher", generation_config={"eos_token_id": [1, 9]})},
    ),
    bad(
        "nothing ends a response",
        r"sampling.stop_ids: .* names no token that closes a response. Give token ids, or \[\] to let only",
        {
            f"{STUDENT}.path": model(
                "student",
                config={"eos_token_id": None},
                generation_config={"eos_token_id": None},
                tokenizer_config={"eos_token": ABSENT},
            )
        },
    ),
    bad(
        "stop token that is none",
        r"'<end>' is not one token of this vocabulary",
        {f"{STUDENT}.extra_stop_tokens": ["<end>"]},
    ),
    bad(
        "stop id out of range",
        r"sampling.stop_ids: expected token ids from 0 to 261, got \[999\]",
        {"data.sampling.stop_ids": [999]},
    ),
    # lengths
    bad(
        "prompts beyond the context",
        r"of 8 train prompts are longer than 12 tokens .*context is 20.*drop_long_prompts",
        {f"{STUDENT}.path": model("student", config={"max_position_embeddings": 20})},
    ),
    bad(
        "all prompts too long",
        r"8 of 8 train prompts are longer than 3 tokens .*raise max_prompt_tokens",
        {"data.max_prompt_tokens": 3, "data.drop_long_prompts": True},
    ),
    bad(
        "responses beyond the context",
        r"sampling.max_new_tokens=5000 leaves no room for a prompt in the context of 512",
        {"data.sampling.max_new_tokens": 5000},
    ),
    bad(
        "context wider than the model",
        r"student.max_context_length: .* takes at most 512 tokens, got 5000",
        {f"{STUDENT}.max_context_length": 5000},
    ),
    bad(
        "teacher reads less",
        r"model.teacher: it reads at most 20 tokens",
        {f"{TEACHER}.path": model("teacher", config={"max_position_embeddings": 20})},
    ),
    # models
    bad("no model folder", r"student.path: no folder './absent'", {f"{STUDENT}.path": "./absent"}),
    bad("no teacher folder", r"teacher.path: no folder './absent'", {f"{TEACHER}.path": "./absent"}),
    bad(
        "folder without a model",
        r"student.path: no config.json in .* \(found: nothing\)",
        {f"{STUDENT}.path": folder("empty")},
    ),
    bad(
        "unknown architecture",
        r"student.path: cannot load the configuration .* model type `abacus`",
        {f"{STUDENT}.path": model("student", config={"model_type": "abacus"})},
    ),
    bad(
        "no weight file",
        r"student.path: cannot load the weights",
        {f"{STUDENT}.path": model("student")},
        loaded=("HFStudent",),
    ),
    bad(
        "weights cut short",
        r"student.path: a weight file in .* is damaged or cut short",
        {f"{STUDENT}.path": cut_short("student")},
    ),
    bad(
        "a teacher's weights cut short",
        r"teacher.path: a weight file in .* is damaged or cut short",
        {f"{TEACHER}.path": cut_short("teacher")},
    ),
    bad("NaN among the weights", r"student.path: .* NaN", {f"{STUDENT}.path": with_nan}, loaded=("HFStudent",)),
    bad(
        "unknown dtype", r"student.dtype: expected 'auto' or one of float32, .* got 'fp8'", {f"{STUDENT}.dtype": "fp8"}
    ),
    bad(
        "unknown attention",
        r"student.attn_implementation='flash'",
        {f"{STUDENT}.attn_implementation": "flash"},
        loaded=("HFStudent",),
    ),
    bad("LoRA of rank 0", r"student.lora.r: expected an integer of at least 1, got 0.$", {f"{STUDENT}.lora": {"r": 0}}),
    bad(
        "base teacher without LoRA",
        r"BaseModelTeacher is the student without its adapter, but the student has none",
        {"model.teacher": "BaseModelTeacher"},
    ),
    bad(
        "quantisation without a method",
        r"expected a key 'quant_method' .* beside \['bits'\].$",
        {f"{TEACHER}.quantization_config": {"bits": 4}},
    ),
    # settings that contradict each other
    bad(
        "k=1 renormalised",
        r"support.k: .* has no gradient. Use k of at least 2, or normalization: tail.$",
        objective(support=of_class("StudentTopK", k=1)),
    ),
    bad(
        "un-normalised, differentiated",
        r"support.normalization: differentiating the un-normalised divergence on StudentTopK moves the student",
        objective(support=of_class("StudentTopK", normalization="none")),
    ),
    bad(
        "sampled token among candidates",
        r"objective.estimator: CandidateScore weights candidates, .* Use SampledTokenObjective",
        objective(support="SampledToken", estimator="CandidateScore"),
    ),
    bad(
        "tail of everything",
        r"FullVocabulary has no argument normalization",
        objective(support=of_class("FullVocabulary", normalization="tail")),
    ),
    bad(
        "ratio without a sample",
        r"DivergenceObjective has no argument importance",
        objective(support="StudentTopK", importance="Clipped"),
    ),
    bad(
        "two temperatures",
        r"sampling.temperature is 0.7 but objective.student_temperature is 1.0",
        {"data.sampling.temperature": 0.7},
    ),
    bad(
        "top-p and the whole distribution",
        r"sampling.top_p=0.9 .* cut tokens off.*allow_biased_sampling",
        {"data.sampling.top_p": 0.9},
    ),
    bad("top-p above 1", r"sampling.top_p: expected a number in \(0, 1\]", {"data.sampling.top_p": 1.9}),
    bad(
        "decay without an end",
        r"total_steps: decay='linear' needs the step at which it ends",
        {"model.lr_scheduler": of_class("WarmupDecay", decay="linear")},
    ),
    bad(
        "scheduler that needs a metric",
        r"ReduceLROnPlateau waits for a metric",
        {"model.lr_scheduler": of_class("lightning.pytorch.cli.ReduceLROnPlateau", monitor="train/loss")},
    ),
    bad(
        "negative learning rate",
        r"model.optimizer.lr: Invalid learning rate: -1.0",
        {"model.optimizer": of_class("torch.optim.AdamW", lr=-1.0)},
    ),
    bad(
        "optimiser that needs a closure",
        r"model.optimizer: LBFGS computes the loss several times per step .* needs gradients only",
        {"model.optimizer": of_class("torch.optim.LBFGS")},
    ),
    bad(
        "older point on a GPU that is not there",
        r"anchor_device: expected null .* got 'cuda:300'",
        {
            "trainer.callbacks": [
                of_class("EffOPD", score=of_class("TeacherKL", num_prompts=4), anchor_device="cuda:300")
            ]
        },
    ),
    bad(
        "two EffOPD callbacks of one name",
        r"callbacks: several EffOPD callbacks have no name, .* Give each a name of its own",
        {"trainer.callbacks": [of_class("EffOPD", score=of_class("TeacherKL", num_prompts=4))] * 2},
    ),
    bad(
        "more prompts for a score than there are",
        r"EffOPD score: 50 prompts were asked for, but there are 8 training problems",
        {"trainer.callbacks": [of_class("EffOPD", score=of_class("TaskAccuracy"))]},
        loaded=("HFStudent",),  # scores are asked when everything they may read is there; teacher and engine come later
    ),
    bad(
        "negative clipping",
        r"model.gradient_clip_norm: expected a positive number or null, got -1.0",
        {"model.gradient_clip_norm": -1.0},
    ),
    bad("no prompts", r"data.prompts_per_step: expected an integer of at least 1, got 0", {"data.prompts_per_step": 0}),
    bad(
        "uneven split",
        r"data.prompts_per_step=4 cannot be split evenly over 3 processes. Choose a multiple of 3",
        num_processes=3,
    ),
    bad(
        "too small a micro-batch",
        r"model.max_tokens_per_micro_batch=20 cannot hold one rollout: .* at least 29",
        {"model.max_tokens_per_micro_batch": 20},
    ),
    bad(
        "a setting that has moved",
        r"there is no setting model.updates_per_batch. Set data.source: \{class_path: Reuse",
        {"model.updates_per_batch": 10},
    ),
    bad("fp16", r"trainer.precision='16-true': expected 32-true or bf16-mixed", {"trainer.precision": "16-true"}),
    bad("clipping by the trainer", r"Set model.gradient_clip_norm instead", {"trainer.gradient_clip_val": 1.0}),
    bad(
        "accumulation by the trainer",
        r"trainer.accumulate_grad_batches: .*raise data.prompts_per_step",
        {"trainer.accumulate_grad_batches": 2},
    ),
    bad(
        "validation beyond the pass",
        r"val_check_interval=100: one pass .* only 2 steps. .*check_val_every_n_epoch: null",
        {"trainer.val_check_interval": 100},
    ),
    bad(
        "no validation interval", r"val_check_interval: expected .* got 0. To leave", {"trainer.val_check_interval": 0}
    ),
    bad(
        "validation in no pass",
        r"check_val_every_n_epoch: expected a number of passes of at least 1, .*; got 0",
        {"trainer.check_val_every_n_epoch": 0},
    ),
    bad("words for devices", r"trainer.devices: expected a number, .*; got 'two'", {"trainer.devices": "two"}),
    bad("devices by number on a CPU", r"trainer: `devices` .* should be an int > 0", {"trainer.devices": [0, 0]}),
    bad(
        "scheduler that divides by nothing",
        r"model.lr_scheduler: with these settings no step can be made: integer modulo by zero",
        {"model.lr_scheduler": of_class("CosineAnnealingLR", T_max=0)},
    ),
    bad(
        "optimiser that wants a closure",
        r"model.optimizer: LBFGS computes the loss several times per step .* such as torch.optim.AdamW",
        {"model.optimizer": of_class("LBFGS")},
    ),
    bad(
        "optimiser of sparse gradients",
        r"model.optimizer: .* SparseAdam does not support dense gradients",
        {"model.optimizer": of_class("SparseAdam")},
    ),
    bad(
        "learning rate of nothing",
        r"model.optimizer: '<' not supported",
        {"model.optimizer": of_class("SGD", lr=None)},
    ),
    bad(
        "stopping on an unknown metric",
        r"Early stopping conditioned on metric `val/nothing` .* `val/avg_at_1`",
        {"trainer.callbacks": [of_class("EarlyStopping", monitor="val/nothing")]},
        loaded=("HFStudent", "HFTeacher"),
    ),
    bad("package not installed", r"Install s3fs to access S3", {}, "--ckpt_path", "s3://b/x"),
    bad("no such accelerator", r"invalid accelerator name: `accelerator='abacus'`", {"trainer.accelerator": "abacus"}),
    # checkpoints
    resume(
        "no checkpoint",
        r"ckpt_path: no file '.*absent.ckpt'. Checkpoints there: good.ckpt",
        lambda at: str(at.checkpoint.with_name("absent.ckpt")),
    ),
    resume(
        "checkpoint cut short",
        r"half.ckpt' \(\d+ bytes\) is cut short or not a checkpoint. No other checkpoint beside it is whole",
        half_of_the_checkpoint,
    ),
    resume("empty checkpoint", r"empty.ckpt' \(0 bytes\) is cut short", file("empty.ckpt", "")),
    resume(
        "checkpoint of something else",
        r"was not written by OPDModule",
        edited_checkpoint(lambda content: {"state_dict": {}}),
    ),
    resume(
        "model folder as checkpoint",
        r"is a model folder, not a checkpoint. Set student.path to it instead",
        model("student"),
    ),
    resume(
        "smaller student",
        r"does not fit the student: student.model.layers.3.* and absent in the model",
        the_checkpoint,
        {
            f"{STUDENT}.path": model(
                "student", weights=True, config={"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
            )
        },
        loaded=("HFStudent",),
    ),
    resume(
        "LoRA in place of all weights",
        r"student.lora: the checkpoint was written with None, this run has {'r': 2",
        the_checkpoint,
        {f"{STUDENT}.lora": {"r": 2}},
        loaded=("HFStudent",),
    ),
    resume(
        "other prompts per step",
        r"data.prompts_per_step: the checkpoint was written with 4, this run has 2",
        the_checkpoint,
        {"data.prompts_per_step": 2},
        loaded=("HFStudent",),
    ),
    resume(
        "other data",
        r"data.task \(training problems\): the checkpoint was written with 8 problems .*, this run has 12 problems",
        the_checkpoint,
        {f"{TASK}.num_train": 12},
        loaded=("HFStudent",),
    ),
    resume(
        "other selector",
        r"data.selector: the checkpoint was written with Shuffled, this run has DifficultyPool",
        the_checkpoint,
        {"data.selector": "DifficultyPool"},
        loaded=("HFStudent",),
    ),
    resume(
        "other optimiser",
        r"model.optimizer: the checkpoint was written with AdamW, this run has SGD",
        the_checkpoint,
        {"model.optimizer": of_class("torch.optim.SGD", lr=0.1)},
        loaded=("HFStudent",),
    ),
    # commands other than fit
    validate(
        "predict a split that is none",
        r"data.predict_split: expected one of 'train', .*, got holdout",
        {"data.predict_split": "holdout"},
    ),
    bad("nothing to test on", r"no problems in its 'test' split", {f"{TASK}.num_test": 0}, command="test"),
    export(
        "export over something",
        r"output: '.*taken' exists and is not an empty folder",
        the_checkpoint,
        file("taken", "x"),
    ),
    resume("folder as checkpoint", r"x' is a folder; expected one file, such as last.ckpt", folder("x")),
    export(
        "export below a file",
        r"output: '.*taken/out' cannot be a folder, since '.*taken' is a file",
        the_checkpoint,
        lambda at: file("taken", "x")(at) + "/out",
    ),
    export(
        "export of a student that has moved",
        r"student_path: no folder './gone'.* had its student at './gone': if that has moved, add --student_path",
        edited_checkpoint(lambda content: content["opd_lightning"]["student"]["init_args"].update(path="./gone")),
        "out",
        loaded=("HFStudent",),
    ),
    export(
        "export to a student that is not there",
        r"student_path: no folder './nor_here'",
        the_checkpoint,
        "out",
        "--student_path",
        "./nor_here",
        loaded=("HFStudent",),
    ),
    export("unknown dtype", r"dtype: expected one of 'float32', .*; got fp8", the_checkpoint, "out", "--dtype", "fp8"),
    export(
        "private what", r"private: it is about the repository of push_to_hub", the_checkpoint, "out", "--private=true"
    ),
    export(
        "no name for a repository",
        r"push_to_hub: .*Expected a repository such as me/my-student",
        the_checkpoint,
        "out",
        "--push_to_hub=a/b/c",
    ),
    export("export nothing", r"ckpt_path: no file 'absent.ckpt'", "absent.ckpt", "out"),
    export(
        "export a foreign class",
        r"the student's class 'os.system' is not ours",
        edited_checkpoint(lambda content: content["opd_lightning"]["student"].update(class_path="os.system")),
        "out",
    ),
    export(
        "export of a newer version",
        r"cannot be built by this version: .* no argument wings",
        edited_checkpoint(lambda content: content["opd_lightning"]["student"]["init_args"].update(wings=2)),
        "out",
    ),
    export(
        "abbreviated export flag",
        r"no option --merge. Did you mean --merge_adapter\?",
        the_checkpoint,
        "out",
        "--merge=false",
    ),
]


def run(folder, changes, *arguments, command="fit"):
    config = () if command == "export" else ("--config", write_config(folder, changes))
    cli.main([command, *config, *arguments])


def saver(folder, **options):
    return {
        "trainer.enable_checkpointing": True,
        "trainer.callbacks": [
            of_class(
                "lightning.pytorch.callbacks.ModelCheckpoint", dirpath=str(folder), every_n_train_steps=1, **options
            )
        ],
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    run(folder, saver(folder, filename="good"))
    return folder / "good.ckpt"


@pytest.fixture
def loads(monkeypatch):
    """Notes which weights are asked for."""
    loaded = []

    def note(cls, method):
        original = getattr(cls, method)

        def noted(self, *args):
            loaded.append(cls.__name__)
            return original(self, *args)

        monkeypatch.setattr(cls, method, noted)

    note(HFStudent, "load")
    note(HFTeacher, "setup")
    return loaded


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["opd-lightning"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_mistake_ends_in_one_clear_line(case, tmp_path, checkpoint, loads, monkeypatch, capfd):
    at = Place(tmp_path, checkpoint)
    changes = {name: value(at) if callable(value) else value for name, value in case.changes.items()}
    arguments = [value(at) if callable(value) else value for value in case.arguments]
    if case.num_processes > 1:
        monkeypatch.setattr(Trainer, "world_size", case.num_processes)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, changes, *arguments, command=case.command)
    shown = capfd.readouterr().err
    (line,) = [line for line in shown.splitlines() if line.startswith("opd-lightning: error: ")]
    assert re.search(case.message, line), line
    assert "Traceback" not in shown and "usage:" not in shown
    assert stopped.value.code == case.status
    assert loads == list(case.loaded)


@pytest.mark.parametrize(
    "changes",
    [
        {
            f"{STUDENT}.path": model(
                "student",
                weights=True,
                config={"pad_token_id": None},
                generation_config={"pad_token_id": None},
                tokenizer_config={"pad_token": ABSENT},
            )
        },
        {"data.max_prompt_tokens": 20, "data.drop_long_prompts": True},
        {"trainer.default_root_dir": lambda at: str(Path(file("config.yaml", "of the last run")(at)).parent)},
    ],
    ids=["no pad token", "some prompts too long", "a folder used before"],
)
def test_what_looks_like_a_mistake_but_is_none(changes, tmp_path, loads):
    at = Place(tmp_path, tmp_path)
    run(tmp_path, {name: value(at) if callable(value) else value for name, value in changes.items()})
    assert loads == ["HFStudent", "HFTeacher"]


def test_settings_that_a_resume_overrides_are_named(tmp_path, checkpoint):
    changes = {
        "trainer.max_steps": 2,
        "model.optimizer": of_class("torch.optim.AdamW", lr=0.5, weight_decay=0.0),
        f"{STUDENT}.path": model("student", weights=True)(Place(tmp_path, checkpoint)),
    }
    with (
        pytest.warns(
            UserWarning, match=r"init_args.lr: a resumed run keeps the checkpoint's 1e-06; this run's 0.5 is ignored"
        ),
        pytest.warns(
            UserWarning, match=r"student.path: the checkpoint was written with 'sandbox:student', this run has"
        ),
    ):
        run(tmp_path, changes, "--ckpt_path", str(checkpoint))


@pytest.mark.parametrize("filename", [pytest.param("{step}", marks=pytest.mark.slow), "the only one"])
def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(filename, tmp_path, monkeypatch, capfd):
    """No file may grow beyond a limit that is set once the first checkpoint is there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved = []
    save = WholeCheckpoints.save_checkpoint

    def save_and_fill_up(self, content, path, **options):
        save(self, content, path, **options)
        saved.append(Path(path))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", save_and_fill_up)
    changes = {"trainer.max_steps": 3} | saver(tmp_path / "saved", filename=filename, enable_version_counter=False)
    try:
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, changes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stopped.value.code == 1
    said = capfd.readouterr()
    assert re.search("No rescue: .* File too large", said.out)
    assert re.search(r"error: the checkpoint '.*' cannot be saved: File too large \(.* GiB free\). Earlier", said.err)
    assert [path for path in (tmp_path / "saved").iterdir() if path.suffix == ".ckpt"] == saved[:1]
    assert not list(tmp_path.rglob("*.part"))
    assert read_checkpoint(saved[0])["global_step"] == 1
    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", save)
    run(tmp_path, changes | {"trainer.max_steps": 2}, "--ckpt_path", str(saved[0]))
    assert (
        read_checkpoint(max((tmp_path / "saved").iterdir(), key=lambda path: path.stat().st_mtime))["global_step"] == 2
    )
