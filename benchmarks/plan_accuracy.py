"""Does `plan` say what a step then takes? Memory and processor time of whole fits beside what was planned.

Every setting is planned and then run: two steps of a real fit, twice, each in a process of its own (forked: one thread
only). In the first, memory that is let go goes back to the system at once (`mallopt`), so that the resident memory of
the process, the figure that `model.measure_memory` logs, is that of its tensors; what was resident before the models
were loaded is taken off. The second has the system's ordinary allocator and is for the seconds, in processor time, of
the second step: three turns of measuring the machine, planning and running, since others use the machine too; the
error is the median turn's. `ordinary` measures the peak under that allocator.

Command: python benchmarks/plan_accuracy.py memory [SETTING ...], then `seconds`, `ordinary`: adds what is missing
`... replan` plans the memory again for what has been measured; `... table` prints.
"""

import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "plan_accuracy_cpu-2core.json"
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt(3)
PARTS = ("generate", "teacher", "student", "optimizer")
TURNS = 3


@dataclass(frozen=True)
class Size:
    """Shape of a model."""

    hidden: int
    layers: int
    heads: int
    family: str = "qwen3"


SIZES = {
    "3M": Size(192, 4, 4),
    "12M": Size(384, 6, 6),
    "24M": Size(512, 8, 8),
    "12M-llama": Size(384, 6, 6, "llama"),
}


@dataclass(frozen=True)
class Setting:
    """A step."""

    student: str = "12M"
    teacher: str | None = "12M"
    vocabulary: int = 8192
    prompt: int = 32
    response: int = 32
    rollouts: int = 16
    max_tokens: int = 16384
    lora: int = 0
    checkpointing: bool = False
    optimizer: str = "AdamW"
    objective: str = "reverse_kl"
    effopd: bool = False
    bits: int = 0
    offload: bool = False


SETTINGS = {
    "plain": Setting(),
    "checkpointing": Setting(checkpointing=True),
    "LoRA": Setting(lora=16),
    "SGD": Setting(optimizer="SGD"),
    "large vocabulary": Setting(vocabulary=32768, rollouts=8),
    "small micro-batches": Setting(max_tokens=256),
    "larger teacher": Setting(teacher="24M", rollouts=8),
    "larger student": Setting(student="24M", rollouts=8),
    "sampled tokens only": Setting(objective="sampled"),
    "long answers": Setting(response=224, rollouts=4),
    "many rollouts": Setting(student="3M", teacher="3M", rollouts=64),
    "Llama": Setting(student="12M-llama", teacher="12M-llama"),
    "Adafactor": Setting(optimizer="Adafactor"),
    "top 16 of the student": Setting(objective="top_k"),
    "LoRA, checkpointing": Setting(lora=16, checkpointing=True),
    "EffOPD": Setting(student="24M", teacher="3M", rollouts=8, effopd=True),
    "long cache": Setting(teacher="3M", response=96, rollouts=64, max_tokens=512),
    "8-bit Adam": Setting(student="24M", teacher="3M", rollouts=8, optimizer="AdamW8bit"),
    "4-bit teacher": Setting(student="3M", teacher="24M", rollouts=8, bits=4),
    "offload": Setting(student="3M", teacher="24M", rollouts=8, vocabulary=32768, offload=True),
}


def make_model(folder: Path, name: str, vocabulary: int) -> Path:
    """Write a random model and its tokenizer, one character a token, as the hub would hold them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    target, size = folder / f"{name}-{vocabulary}", SIZES[name]
    if target.exists():
        return target
    config = AutoConfig.for_model(
        size.family,
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    letters = {chr(0x4E00 + i): i for i in range(vocabulary)}
    core = Tokenizer(models.WordLevel(vocab=letters, unk_token=chr(0x4E02)))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=chr(0x4E00),
        eos_token=chr(0x4E01),
        unk_token=chr(0x4E02),
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(target)
    return target


def make_run(setting: Setting, folder: Path) -> tuple[Any, Any]:
    """Module and data module of a setting."""
    from opd_lightning.backends.hf import HFStudent, HFTeacher, LoraSettings
    from opd_lightning.interfaces import Problem, Sampling, Task
    from opd_lightning.objectives import DivergenceObjective, SampledTokenObjective, StudentTopK
    from opd_lightning.training.datamodule import OPDDataModule
    from opd_lightning.training.module import OPDModule

    class Fixed(Task):
        def problems(self, split: str) -> list[Problem]:
            text = "".join(chr(0x4E00 + 3 + i) for i in range(setting.prompt))
            return [Problem(str(i), ({"role": "user", "content": text},)) for i in range(setting.rollouts)]

    make_optimizer = {
        "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5),
        "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-5),
        "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-5),
        "AdamW8bit": _eight_bits,
    }
    objectives = {
        "reverse_kl": DivergenceObjective,
        "sampled": SampledTokenObjective,
        "top_k": lambda: DivergenceObjective(StudentTopK(16)),
    }
    student = HFStudent(
        str(make_model(folder, setting.student, setting.vocabulary)),
        lora=LoraSettings(r=setting.lora) if setting.lora else None,
        gradient_checkpointing=setting.checkpointing,
        packing=False,  # as a plan takes it to be
    )
    teacher = None
    if setting.teacher:
        bits = {"quant_method": "bitsandbytes", f"load_in_{setting.bits}bit": True}
        path = str(make_model(folder, setting.teacher, setting.vocabulary))
        given = {"quantization_config": bits if setting.bits else None, "offload": setting.offload}
        teacher = HFTeacher(path, packing=False, **given)
    module = OPDModule(
        student,
        teacher,
        objectives[setting.objective](),
        optimizer=make_optimizer[setting.optimizer],
        max_tokens_per_micro_batch=setting.max_tokens,
        measure_memory=True,
    )
    sampling = Sampling(max_new_tokens=setting.response, stop_ids=[])
    return module, OPDDataModule(Fixed(), sampling=sampling, prompts_per_step=setting.rollouts)


def _eight_bits(parameters: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-5)


def make_callbacks(setting: Setting) -> list[Any]:
    """EffOPD, with a score that holds nothing."""
    from opd_lightning.callbacks.effopd import EffOPD

    return [EffOPD(lambda module: 0.0, schedule=1)] if setting.effopd else []


def plan(setting: Setting, folder: Path, hardware: Any) -> dict[str, Any]:
    """What is planned: bytes and seconds by part."""
    from opd_lightning.commands.planned_case import Surroundings, case_of
    from opd_lightning.planning import Layout, budget, rehearse

    module, data = make_run(setting, folder)
    started = time.process_time()
    case = case_of(module, data, Surroundings("32-true", 1, make_callbacks(setting)), setting.prompt)
    phases = budget(case, rehearse(case, hardware), Layout(is_gpu=False), memory_gb=1.0).phases
    return {"parts": [asdict(phase) for phase in phases], "planning_seconds": time.process_time() - started}


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    """Two steps of a fit in this process: bytes above what is resident now, and processor seconds, of the last."""
    from lightning.pytorch import Callback, Trainer, seed_everything

    from opd_lightning.rollouts import answering, on_policy
    from opd_lightning.training import stopwatch
    from opd_lightning.training.peak_memory import PeakMemory

    for module_with_clock in (answering, on_policy, stopwatch):
        if hasattr(module_with_clock, "time"):
            module_with_clock.time = SimpleNamespace(perf_counter=time.process_time)

    class Watch(Callback):
        found: dict[str, Any] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            metrics = trainer.callback_metrics
            self.found = {
                "peaks": {part: 1e9 * gb - resident for part, gb in pl_module.stopwatch.memory_gb.items()}
                | ({"search": memory.read() - resident} if setting.effopd else {}),
                "seconds": {
                    part: float(metrics[f"train/seconds/{part}"])
                    for part in PARTS
                    if f"train/seconds/{part}" in metrics
                },
            }

    def fit(what: Setting, num_steps: int) -> dict[str, Any]:
        watch = Watch()
        seed_everything(0, verbose=False)
        module, data = make_run(what, folder)
        trainer = Trainer(
            accelerator="cpu", max_steps=num_steps, max_epochs=-1, limit_val_batches=0,
            callbacks=[*make_callbacks(what), watch], logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(module, data)
        return watch.found

    resident, memory = 0.0, PeakMemory(torch.device("cpu"))
    small = replace(
        setting, student="3M", teacher="3M" if setting.teacher else None, rollouts=2, response=8, vocabulary=512
    )
    fit(small, 2)  # whatever is imported or set up once is there
    memory.restart()
    resident = float(memory.read())
    return fit(setting, 2)


def run(setting: Setting, is_tidy: bool, folder: Path) -> dict[str, Any]:
    """A setting in a process of its own."""

    def work() -> dict[str, Any]:
        if is_tidy:
            library = ctypes.CDLL(None)
            library.mallopt(MMAP_THRESHOLD, 2**15)
            library.mallopt(TRIM_THRESHOLD, 2**16)
        return measure(setting, folder)

    return in_child(work, folder)


def in_child(work: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What it gives in a process of its own, which leaves no freed memory here that the next one would find."""
    target = folder / "found.json"
    pid = os.fork()
    if pid == 0:
        try:
            target.write_text(json.dumps(work()))
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(pid, 0)
    found = json.loads(target.read_text())
    target.unlink()
    return found


def main(turn: str, names: list[str]) -> None:
    """Plan and measure; results are written after each setting."""
    from opd_lightning.planning import this_machine

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"settings": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in names or SETTINGS:
            setting = SETTINGS[name]
            row = results["settings"].setdefault(name, {"setting": asdict(setting)})
            if (turn if turn != "seconds" else "turns") in row and not names:
                continue
            if turn == "seconds":
                row.pop("turns", None)
            for _ in range(TURNS if turn == "seconds" else 1):
                hardware = this_machine() if turn == "seconds" else None  # anew: others use the machine too
                row["planned"] = in_child(partial(plan, setting, Path(folder), hardware), Path(folder))
                found = run(setting, turn == "memory", Path(folder))
                if turn != "seconds":
                    row[turn] = found["peaks"]
                else:
                    planned = {part["name"]: part["seconds"] for part in row["planned"]["parts"]}
                    turns = row.setdefault("turns", [])
                    turns.append({"hardware": asdict(hardware), "planned": planned, "measured": found["seconds"]})
            results |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(line_of(name, row), flush=True)


def replan() -> None:
    """Plan the memory again, beside the measurements that are there."""
    results = json.loads(RESULTS.read_text())
    with tempfile.TemporaryDirectory() as folder:
        for name, row in results["settings"].items():
            row["planned"] = plan(SETTINGS[name], Path(folder), None)
            print(line_of(name, row), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def errors_of(row: dict[str, Any]) -> dict[str, float]:
    """Planned over measured, less 1: of the highest peak, of the step's seconds, and of its parts."""
    errors = {}
    if "memory" in row:
        errors["memory"] = peak_of(row) / max(row["memory"].values()) - 1
    if "turns" in row:
        errors["seconds"] = _median_error(row["turns"], PARTS)
        errors |= {part: _median_error(row["turns"], [part]) for part in PARTS if part in row["turns"][0]["measured"]}
    return errors


def _median_error(turns: list[dict[str, Any]], parts: Sequence[str]) -> float:
    return statistics.median(
        sum(turn["planned"].get(part, 0.0) for part in parts) / sum(turn["measured"].get(part, 0.0) for part in parts)
        - 1
        for turn in turns
    )


def peak_of(row: dict[str, Any]) -> float:
    """Bytes planned."""
    return max(sum(part["peak"].values()) for part in row["planned"]["parts"])


def line_of(name: str, row: dict[str, Any]) -> str:
    """For the table of docs/plan.md."""
    errors = errors_of(row)
    cells = [name, *[""] * 6]
    if "memory" in errors:
        peak = max(row["memory"].values())
        cells[1:4] = [f"{1e-6 * peak:,.0f}", f"{1e-6 * peak_of(row):,.0f}", f"{errors['memory']:+.0%}"]
    if "seconds" in errors:
        measured, planned = (
            statistics.median(sum(turn[key].values()) for turn in row["turns"]) for key in ("measured", "planned")
        )
        cells[4:7] = [f"{measured:.1f}", f"{planned:.1f}", f"{errors['seconds']:+.0%}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    word, *names = sys.argv[1:] or ["memory"]
    if word == "table":
        for name, row in json.loads(RESULTS.read_text())["settings"].items():
            print(line_of(name, row))
    elif word == "replan":
        replan()
    else:
        main(word, names)
