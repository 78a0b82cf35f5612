"""Every block and command of the pages runs, or is parsed by the real parser, or says in the page why not."""

import argparse
import ast
import contextlib
import inspect
import runpy
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache, wraps
from pathlib import Path

import pytest
import torch
from doc_blocks import ROOT, Block, blocks, commands
from lightning.pytorch import LightningModule

from opd_lightning.commands import cli

BLOCKS = blocks()
COMMANDS = commands()
READ = {"text", "html", "json"}  # shown, not run: what a command prints, or what a file looks like
NOT_RUN = {  # why a block is not run, page by page
    "docs/methods/recipes.md": [
        "three runs in a row; done by hand, 22 November",
        "four runs in a row and loops of the shell; done by hand, 22 November",
    ],
    "docs/offline.md": ["fetches some 12 GB from the hub"],
    "docs/optimizers.md": [
        "bitsandbytes is no dependency; tests/training/test_optimizers.py runs it",
        "bitsandbytes is no dependency; tests/training/test_optimizers.py runs it",
        "bitsandbytes is no dependency; tests/backends/test_quantized_teachers.py runs such teachers",
    ],
    "docs/prompts.md": [
        "templates.yaml is the block below",
        "settings of diagnose, not of fit; tests/tasks/test_prompts_docs.py reads it",
        "the file is written by the command above; tests/commands/test_diagnose.py does both",
    ],
    "docs/several_gpus.md": [
        "the checkpoint is the reader's",
        "several nodes; tests/training/test_several_gpus_docs.py builds what it says",
        "SLURM; tests/training/test_several_gpus_docs.py builds what it says",
    ],
    "docs/tokens.md": ["tests/reports/test_token_records.py runs it on records made there"],
    "docs/vllm.md": ["two GPUs and vLLM's server; .ci/vllm starts such servers on vLLM's CPU build"],
}
SMALLEST = "--model.student HFStudent --model.student.path sandbox:student --data.task ArithmeticTask"
SANDBOX = ("@quickstart", "configs/quickstart.yaml")
SHORTER = {  # what a command on the sandbox gets so that it takes seconds
    "fit": "--trainer.limit_val_batches 1 --data.num_validation_problems 8 --data.prompts_per_step 4"
    " --trainer.enable_progress_bar false --trainer.max_steps",
    "rollout": "--num_problems 16 --trainer.enable_progress_bar false",
    "diagnose": "--num_prompts 8 --gradient_rollouts 8",
}


FEW_PROBLEMS = "--data.task.num_train 64 --data.task.num_validation 16"  # of the sandbox's own task


def of(*languages):
    return [block for block in BLOCKS if block.language in languages and not block.not_run]


def fits(block: Block) -> bool:
    return ".fit(" in block.code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder like a fresh clone; what is written there is gone afterwards, and modules of it are forgotten."""
    for name in ("configs", "benchmarks", "tests", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "x.yaml").symlink_to(ROOT / "configs" / "quickstart.yaml")  # "x.yaml" is yours
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == tmp_path:
            del sys.modules[name]


def test_every_block_is_of_a_kind_that_is_looked_at():
    kinds = Counter("not run" if block.not_run else block.language or "no language" for block in BLOCKS)
    assert set(kinds) <= {"python", "yaml", "bash", "not run", *READ}, kinds
    assert kinds["python"] >= 10 and kinds["yaml"] >= 15 and kinds["bash"] >= 12, kinds


def test_what_is_not_run_says_why():
    found = {}
    for block in BLOCKS:
        if block.not_run:
            found.setdefault(block.page, []).append(block.not_run)
    assert found == NOT_RUN


class Line(LightningModule):
    """Stands for the module of the reader."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def loss(self, batch):
        return (self.net(batch) - 2 * batch).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def names_of_the_reader():
    """What a block may use without defining it."""
    batches = torch.utils.data.DataLoader(torch.arange(8.0)[:, None], batch_size=4)
    return {"__name__": "page", "module": Line(), "train_loader": batches, "validation_loader": batches}


@pytest.mark.parametrize(
    "block",
    [pytest.param(each, marks=[pytest.mark.slow] if fits(each) else [], id=str(each)) for each in of("python")],
)
def test_a_python_block_runs(block, folder):
    with torch.random.fork_rng():
        exec(compile(block.code, str(block), "exec"), names_of_the_reader())


class Parsed(Exception):
    """The words of a command were understood."""


class OnlyParser(cli.OPDCLI):
    """The parser of the command line, which nothing is built by."""

    def parse_arguments(self, parser, args):
        raise Parsed


@cache
def parser_of(verb):
    door = OnlyParser.__new__(OnlyParser)
    with contextlib.suppress(Parsed):
        door.__init__([verb])
    return door.parser


def parse(words, monkeypatch, capsys):
    """Have the words after `opd-lightning` parsed; fails with what the command would have said."""
    if not words or words[0].startswith("-"):
        words = ["fit", *words]
    assert words[0] in cli.COMMANDS, words
    try:
        if words[0] in cli.PLAIN_COMMANDS:
            monkeypatch.setitem(cli.PLAIN_COMMANDS, words[0], stands_in_for(cli.PLAIN_COMMANDS[words[0]]))
            cli.main(words)
        else:
            parser_of(words[0]).parse_args(words)
    except Parsed:
        return
    except SystemExit as stop:
        if stop.code:
            pytest.fail(capsys.readouterr().err)
    except ValueError as error:
        pytest.fail(str(error))


def stands_in_for(function):
    @wraps(function)
    def parsed(**settings):
        inspect.signature(function).bind(**settings)
        raise Parsed

    return parsed


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_a_yaml_block_goes_on_top_of_a_configuration(block, folder, monkeypatch, capsys):
    for name, code in block.files.items():
        (folder / name).write_text(code)
    (folder / "block.yaml").write_text(block.code)
    parse(["fit", *SMALLEST.split(), "--config", "block.yaml"], monkeypatch, capsys)


def check_opd_lightning(words, monkeypatch, capsys):
    if len(words) > 1:  # `opd-lightning rollout` alone is a name
        parse(words, monkeypatch, capsys)
    else:
        assert words[0] in cli.COMMANDS


def check_python(words, monkeypatch):
    """A script of benchmarks/, by its own parser where it has one; a module of the package."""
    if words[0] == "-m":
        package = words[1].partition(".")[0]
        assert (ROOT / "src" / (words[1].replace(".", "/") + ".py")).exists() or package in extras(), words
        return
    script = ROOT / words[0]
    source = script.read_text()
    if "argparse" not in source:
        assert not any(word.startswith("-") for word in words[1:])
        assert all(word in source or word.isdigit() for word in words[1:]), words
        return
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def check_pytest(words):
    """Paths and test names exist, and so do the marks."""
    marks = {line.partition(":")[0] for line in tool("pytest")["ini_options"]["markers"]}
    for before, word in zip([None, *words], words, strict=False):
        path, *name = word.split("::")
        if before == "-m":
            assert set(word.split()) - {"not", "and", "or"} <= marks
        elif before in ("-k", "-n") or word.startswith("-"):
            continue
        else:
            assert (ROOT / path).exists(), word
            assert not name or f"def {name[0]}" in (ROOT / path).read_text(), word


def check_pip(words):
    """Extras exist, and so do the files of constraints and requirements."""
    assert words[0] == "install"
    extras = project()["optional-dependencies"]
    for before, word in zip([None, *words], words, strict=False):
        if before in ("-c", "-r"):
            assert (ROOT / word).exists()
        elif "[" in word:
            asked = word.partition("[")[2].rstrip("]").split(",")
            assert all(extra in extras for extra in asked), word


def check_nox(words):
    assert words[0] == "-s"
    functions = {node.name for node in ast.parse((ROOT / "noxfile.py").read_text()).body if hasattr(node, "name")}
    assert words[1] in functions
    if words[1] == "benchmark":
        assert (ROOT / "benchmarks" / f"{words[3]}.py").exists()
    elif words[2:]:
        check_pytest(words[3:])  # arguments behind -- go to pytest


def check_bash(words):
    assert (ROOT / words[0]).exists()


def extras():
    """The packages of all extras, as one text."""
    return " ".join(package for extra in project()["optional-dependencies"].values() for package in extra)


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tool(name):
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][name]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_understood(command, folder, monkeypatch, capsys):
    for name, code in command.files.items():
        (folder / name).write_text(code)
    program, *words = command.words
    match program:
        case "opd-lightning":
            check_opd_lightning(words, monkeypatch, capsys)
        case "python":
            check_python(words, monkeypatch)
        case "pytest":
            check_pytest(words)
        case "pip":
            check_pip(words)
        case "nox":
            check_nox(words)
        case "bash":
            check_bash(words)
        case _:  # a tool of the extra `dev`
            assert program in extras(), f"{program}: nobody knows whether that runs"


def run_script(*words):
    done = subprocess.run([sys.executable, "-m", "opd_lightning", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def trained_here(block):
    """The commands of a block that train the sandbox's models, and read nothing that the page has not made."""
    ours = [command for command in COMMANDS if command.where == str(block) and command.words[0] == "opd-lightning"]
    on_sandbox = [any(word in SANDBOX for word in each.words) or each.words[1] == "export" for each in ours]
    reads_yours = "path: answers.jsonl" in block.code  # tests/seams has such a file
    return ours if ours and all(on_sandbox) and not reads_yours else []


def trained():
    """Each of them once, however many pages show it."""
    different = {}
    for block in of("bash"):
        words = [[SANDBOX[0] if word in SANDBOX else word for word in each.words] for each in trained_here(block)]
        if words:
            different.setdefault(str(words), block)
    return list(different.values())


@pytest.mark.slow
@pytest.mark.parametrize("block", trained(), ids=str)
def test_commands_on_the_sandbox_run(block, folder):
    """In their order, with fewer and smaller steps."""
    for name, code in block.files.items():
        (folder / name).write_text(code)
    for command in trained_here(block):
        _, verb, *words = command.words
        if verb == "rollout":
            (folder / Path(words[words.index("--output") + 1]).parent).mkdir(parents=True, exist_ok=True)
        if "--trainer.devices" in words:  # which starts this script again, for the second process
            run_script(verb, *words, *SHORTER[verb].split(), "2")
            continue
        texts = [block.code, *block.files.values()]
        problems = [] if any("task:" in text or "--data.task" in text for text in texts) else FEW_PROBLEMS.split()
        steps = ["20" if "export" in block.code else "2"] if verb == "fit" else []  # the first checkpoint is at step 20
        cli.main([verb, *words, *SHORTER.get(verb, "").split(), *steps, *(problems if verb in SHORTER else [])])
