"""The contenders of `throughput.py`, one a process: each trains, and waits for a word before every step.

    python benchmarks/throughput_contenders.py CONTENDER WORK FOLDER

Says on its output, a line of JSON each: that it is ready, and of every step its processor seconds and its tokens. Reads
on its input: "go", or "stop", after which it tells its peak of memory and ends.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from throughput_models import Work, make_models, make_texts, make_tokenizer

LEARNING_RATE = 1e-6  # far too small to change what the next rollouts look like; the work is the same
PLAIN_MICRO_BATCH = 16  # rollouts whose logits a hand-written loop holds at once
PARTS = ("generate", "teacher", "student", "optimizer")


class Gate:
    """Waits before each step and measures it.

    Args:
        out: File descriptor of what the parent reads.
    """

    def __init__(self, out: int) -> None:
        self._out = out
        self._imported = resident_mib()
        self._started = 0.0

    def ready(self) -> None:
        """Models are loaded; wait for the first step."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._say({"ready": True})
        self._wait()

    def done(self, num_tokens: int, parts: dict[str, float] | None = None) -> None:
        """A step has trained so many tokens; wait for the next."""
        seconds = time.process_time() - self._started
        self._say({"seconds": seconds, "tokens": num_tokens} | ({"parts": parts} if parts else {}))
        self._wait()

    def _say(self, facts: dict[str, Any]) -> None:
        os.write(self._out, (json.dumps(facts) + "\n").encode())

    def _wait(self) -> None:
        if sys.stdin.readline().strip() != "go":
            highest = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
            self._say({"peak_mib": highest, "peak_mib_above_imports": highest - self._imported})
            os._exit(0)  # the trainer would go on for a million steps
        self._started = time.process_time()


def resident_mib() -> float:
    """Memory in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def train_ours(work: Work, folder: Path, make_gate: Callable[[], Any]) -> None:
    """`fit`, as the command line calls it."""
    from lightning.pytorch import Callback, Trainer, seed_everything

    from opd_lightning import DivergenceObjective, HFStudent, HFTeacher, OPDDataModule, OPDModule, Sampling, StudentTopK

    class Steps(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            gate.ready()

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            parts = {part: float(trainer.callback_metrics[f"train/seconds/{part}"]) for part in PARTS}
            gate.done(batch.num_response_tokens, parts)

    from throughput_models import WordPrompts

    time.perf_counter = time.process_time  # the run's own stopwatch tells processor seconds: other work is going on
    gate = make_gate()
    seed_everything(0, verbose=False)
    student, teacher = make_models(folder, work)
    objective = DivergenceObjective(StudentTopK(work.top_k)) if work.top_k else DivergenceObjective()
    module = OPDModule(HFStudent(student), HFTeacher(teacher, dtype="float32"), objective, optimizer=optimizer_of)
    sampling = Sampling(max_new_tokens=work.max_new_tokens)
    data = OPDDataModule(WordPrompts(work), sampling=sampling, prompts_per_step=work.num_rollouts)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=10**6,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[Steps()],
        default_root_dir=folder,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)


def train_trl(work: Work, folder: Path, make_gate: Callable[[], Any]) -> None:
    """TRL's `DistillationTrainer`: reverse KL, no gradient checkpointing, no bfloat16."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            gate.ready()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            lengths = trainer._metrics["train"]["completions/mean_length"]
            gate.done(round(lengths[-1] * work.num_rollouts))

    gate = make_gate()
    student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in make_models(folder, work))
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=work.num_rollouts,
            max_completion_length=work.max_new_tokens,
            max_steps=10**6,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            beta=1.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": make_texts(work)}),
        processing_class=make_tokenizer(work.vocabulary),
        callbacks=[Steps()],
    )
    trainer.train()


def train_plain(work: Work, folder: Path, make_gate: Callable[[], Any]) -> None:
    """What one writes by hand: `generate`, both models' logits, reverse KL over the vocabulary, backward, AdamW."""
    from transformers import AutoModelForCausalLM

    gate = make_gate()
    student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in make_models(folder, work))
    tokenizer, texts = make_tokenizer(work.vocabulary), make_texts(work)
    optimizer = optimizer_of(student.parameters())
    gate.ready()
    for step in range(10**6):
        first = step * work.num_rollouts % (len(texts) - work.num_rollouts)
        prompts = tokenizer(texts[first : first + work.num_rollouts], return_tensors="pt", padding=True)
        rows = student.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            max_new_tokens=work.max_new_tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = rows[:, prompts.input_ids.shape[1] :]
        ended = (answers == tokenizer.eos_token_id).long().cumsum(-1)
        counts = (ended - (answers == tokenizer.eos_token_id).long() == 0).float()
        mask = torch.cat([prompts.attention_mask, counts.long()], dim=1)
        for start in range(0, len(rows), PLAIN_MICRO_BATCH):
            part = slice(start, start + PLAIN_MICRO_BATCH)
            loss = plain_loss(student, teacher, rows[part], mask[part], counts[part])
            (loss / counts.sum()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gate.done(int(counts.sum()))


def plain_loss(student: Any, teacher: Any, rows: torch.Tensor, mask: torch.Tensor, counts: torch.Tensor) -> Any:
    """Sum of the reverse KL over the response tokens."""
    inputs: dict[str, Any] = {
        "input_ids": rows,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "logits_to_keep": counts.shape[1] + 1,
        "use_cache": False,
    }
    with torch.no_grad():
        log_q = teacher(**inputs).logits[:, :-1].log_softmax(-1)
    log_p = student(**inputs).logits[:, :-1].log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * counts).sum()


CONTENDERS = {"ours": train_ours, "TRL": train_trl, "plain loop": train_plain}


def main(contender: str, work: str, folder: str) -> None:
    """Train until told to stop."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is not for the parent
    torch.set_num_threads(1)
    CONTENDERS[contender](Work.read(work), Path(folder), lambda: Gate(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
