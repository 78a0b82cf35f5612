"""The methods of configs/methods as the command builds them, for tests and for the program that they start."""

import re
import shlex
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from zlib import crc32

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from opd_lightning.commands.cli import OPDCLI, main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
NAMES = [path.stem for path in CONFIGS]
FEW_PROBLEMS = ["--data.task.num_train", "48"]  # to draw and to render all problems takes longer than a step
TINY = {
    "trainer.default_root_dir": "runs",
    "data.num_validation_problems": 4,
    "data.prompts_per_step": 4,
    "data.sampling.max_new_tokens": 12,
}
LARGER = {  # where nothing happens at the tiny sizes: some answers must be right
    "antisd": {"data.sampling.max_new_tokens": 40},
    "sdpo": {"data.sampling.max_new_tokens": 40, "data.rollouts_per_prompt": 4},
    "uni_opd": {"data.sampling.max_new_tokens": 40},
    "uni_opd_data": {"data.sampling.max_new_tokens": 40},
}
SCORE = "rollout --config @quickstart --role student --score true --num_problems 40"
BEFORE = {  # commands that make the files a method reads
    "lightning_opd": [
        f"{SCORE} --output scored.jsonl",
        f"{SCORE} --output equal.jsonl --model.teacher.path sandbox:student",
    ],
    "brts": [
        "rollout --config @quickstart --output runs/brts/candidates.jsonl --num_problems 40 --num_samples 4"
        " --reject.duplicates false"
    ],
    "uni_opd_data": [
        "rollout --config @quickstart --role student --output runs/uni_opd/passes.jsonl --num_problems 40"
        " --num_samples 8 --num_attempts 1 --reject.duplicates false"
    ],
    "gkd": ["rollout --config @quickstart --output runs/cold_start/answers.jsonl --num_problems 40"],
}
SERVED = {"ropd": "model.objective.judge.connection.urls"}  # which setting gets the address of a chat server
_OPEN = ExitStack()
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}  # the step is the gradient


def header(path):
    return dict(re.findall(r"^# (\w+): +(.*)$", path.read_text(), flags=re.MULTILINE))


def make_files(name):
    """Run the commands that make what a method reads, in the current folder."""
    for command in BEFORE.get(name, ()):
        size = str(TINY["data.sampling.max_new_tokens"])
        main([*command.split(), "--sampling.max_new_tokens", size, "--reject.truncated", "false", *FEW_PROBLEMS])


@cache
def chat_address():
    """Where a chat server made of rules listens, until this process ends."""
    sys.path.append(str(ROOT / "tests" / "backends"))
    from fake_chat_server import FakeChat
    from fake_vllm_server import serve

    fake = FakeChat()
    fake.measure = lambda answer: crc32(answer.encode()) % 8  # tells all answers apart
    return _OPEN.enter_context(serve(fake))


class Built(OPDCLI):
    """The command up to the point at which it would run."""

    def _run_subcommand(self, subcommand):
        pass


class Start(Callback):
    """What the student was before the first step."""

    def on_train_start(self, trainer, pl_module):
        self.weights = weights_of(pl_module)


def weights_of(module):
    return {name: tensor.detach().clone() for name, tensor in module.model.named_parameters() if tensor.requires_grad}


class Method:
    """A method's objects, built as the command builds them, as often as wanted from settings parsed once.

    Attributes:
        start: The weights before the last run.
    """

    def __init__(self, path, address=None):
        self.name = path.stem
        words = shlex.split(header(path)["Command"])[1:]
        tiny = [word for key, value in (TINY | LARGER.get(self.name, {})).items() for word in (f"--{key}", str(value))]
        # the base's callbacks save and print; those of the method stay
        first = words.index("--config") + 2
        served = [f"--{SERVED[self.name]}", f"[{address or chat_address()}]"] if self.name in SERVED else []
        self.cli = Built([*words[:first], "--trainer.callbacks", "[]", *words[first:], *FEW_PROBLEMS, *tiny, *served])

    def build(self, changes):
        settings = self.cli.config.clone()
        for key, value in changes.items():
            settings[f"fit.{key}"] = value
        return self.cli.parser.instantiate_classes(settings).fit

    def fit(self, folder, steps=1, ckpt_path=None, devices=1, **changes):
        """The student's weights after so many steps."""
        made = self.build({key.replace("__", "."): value for key, value in changes.items()})
        start = Start()
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[
                start,
                *(made.trainer.callbacks or []),
                ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1),
            ],
        )
        trainer.fit(made.model, made.data, ckpt_path=ckpt_path, weights_only=True)
        assert trainer.global_step == steps
        self.start = start.weights
        return weights_of(made.model)
