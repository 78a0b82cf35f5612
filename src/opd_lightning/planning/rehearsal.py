"""A step of the training, rehearsed on tensors without data: what each part of it holds and how long it takes.

The code that runs is that of the step: the models, the loss in one pass, gradient checkpointing, the optimiser. What
is left out is what needs data, the choice of tokens and of problems.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from opd_lightning.backends.hf.anatomy import body_states, decoder_config
from opd_lightning.backends.hf.cache import RoomyCache
from opd_lightning.backends.hf.teacher import HFTeacher
from opd_lightning.backends.hf.teacher_memory import body_of, head_bytes, saved_bytes
from opd_lightning.backends.hf.weightless import without_data
from opd_lightning.interfaces import (
    MicroBatch,
    TeacherScores,
)
from opd_lightning.interfaces.modes import evaluation_mode
from opd_lightning.objectives import compare_in_chunks
from opd_lightning.planning.case import Case, Phase, Rehearsal, SharedTeacher, micro_batch
from opd_lightning.planning.counting import OperationCounter
from opd_lightning.planning.hardware import Hardware
from opd_lightning.planning.optimizer_step import OptimizerStep
from opd_lightning.rollouts.sampling import draw_tokens

CPU = torch.device("cpu")
_ENTRIES = 2**18  # logits of four blocks of the loss


class NotPlannedError(ValueError):
    """A model that cannot be rehearsed."""


def rehearse(case: Case, hardware: Hardware | None = None) -> Rehearsal:
    """A step from the second on, as the hardware would run it.

    Args:
        case: The step.
        hardware: For the seconds; None asks for memory only, which takes less time to find out.

    Raises:
        NotPlannedError: A model decides by its data what it does.
        ValueError: A model is not there, or is none that can be trained here.
    """
    price = hardware.seconds if hardware is not None else lambda operation: 0.0
    try:
        with without_data(), OperationCounter(price) as counter:
            return _Stage(case, counter, knows_time=hardware is not None).run()
    except RuntimeError as error:  # what torch says of operations whose results have no size without data
        reason = str(error).strip().partition("\n")[0]
        raise NotPlannedError(
            f"plan: this step cannot be rehearsed without data ({type(error).__name__}: {reason}). Fit it for three"
            " steps with model.measure_memory: true, which logs train/memory_gb/*."
        ) from error


class _Stage:
    def __init__(self, case: Case, counter: OperationCounter, *, knows_time: bool) -> None:
        self._case, self._counter, self._knows_time = case, counter, knows_time
        self._teacher = copy.copy(case.teacher)  # the copy keeps the model that is none
        self._scores_bytes, self._is_fused = 0, False
        with counter.part("student weights"):
            self._model = case.student.load()
        for each in (*self._model.parameters(), *self._model.buffers()):
            counter.assign(each, "student weights")
        self._trained = [each for each in self._model.parameters() if each.requires_grad]

    def run(self) -> Rehearsal:
        """The whole step."""
        phases = list(self._phases())
        found = Rehearsal(
            phases,
            trained_bytes=sum(_size(each) for each in self._trained),
            gathered_bytes=_gathered(self._model),
            gathered_gradient_bytes=_gathered(self._model, only_trained=True),
            scores_bytes=self._scores_bytes,
            is_fused=self._is_fused,
        )
        teacher = self._teacher
        if not isinstance(teacher, HFTeacher):
            return found
        body, head = body_of(teacher), head_bytes(teacher)
        shared = SharedTeacher(sum(_size(each) for each in body.parameters()), _gathered(body), head)
        return replace(
            found,
            shared_teacher=shared if teacher.is_shared else None,
            resting_bytes=head if teacher.offload else None,
            saved_bytes=saved_bytes(teacher),
        )

    def _phases(self) -> Iterator[Phase]:
        case, counter = self._case, self._counter
        self._make_gradients()
        with counter.part("optimiser state"):
            optimizer = OptimizerStep(case.make_optimizer, self._trained)
        self._is_fused = optimizer.is_fused
        with counter.part("EffOPD's copies"):
            copies = [torch.empty_like(each) for each in self._trained for _ in range(case.num_copies)]
        if self._teacher is not None:
            with counter.part("teacher weights"):
                self._teacher.setup(case.student, self._model, CPU)
        with self._measured("optimizer") as found:
            nn.utils.clip_grad_norm_(self._trained, 1.0)
            optimizer.step()
        for each in self._trained:
            each.grad = None
        if case.engine_rows:
            yield self._generation()
        if case.num_micro_batches > 1:
            self._make_gradients()
        yield from self._training()
        yield found[0]
        del copies

    def _make_gradients(self) -> None:
        with self._counter.part("gradients"):
            for each in self._trained:
                each.grad = torch.empty_like(each)

    @contextmanager
    def _measured(self, name: str, times: float = 1.0, *, is_cached: bool = False) -> Iterator[list[Phase]]:
        """Fill a list with the phase that the block is, so many times."""
        found: list[Phase] = []
        counter = self._counter
        counter.restart()
        with counter.part("activations"), self._case.autocast(is_cached=is_cached):
            yield found
        peak = {part: size for part, size in counter.peak.items() if size}
        work = (counter.seconds, counter.flops, counter.bytes, counter.num_calls)
        found.append(Phase(name, peak, *(times * each for each in work)))

    # ------------------------------------------------------------------------------------------------------ generation

    def _generation(self) -> Phase:
        """Prompts once each, then the first token and the last one; those between take as long on average."""
        case = self._case
        rows = min(case.engine_rows, case.num_rollouts)
        num_batches = case.num_rollouts / rows
        with torch.no_grad(), evaluation_mode(self._model):
            last = self._token(rows, case.length - 1, num_batches * case.response_tokens / 2)
            if not self._knows_time:
                return last
            first = self._token(rows, case.prompt_tokens, num_batches * case.response_tokens / 2)
            with self._measured("generate", num_batches, is_cached=True) as found:
                num_prompts = max(1, rows // case.rollouts_per_prompt)
                states = self._run(torch.zeros(num_prompts, case.prompt_tokens, dtype=torch.int64), case.prompt_tokens)
                del states
        parts = [first, last, found[0]]
        return Phase(
            "generate",
            max(parts, key=lambda part: part.total).peak,
            *(sum(getattr(part, name) for part in parts) for name in ("seconds", "flops", "bytes", "num_calls")),
        )

    def _token(self, rows: int, num_seen: int, times: float) -> Phase:
        """One token for each row, after so many."""
        case, counter = self._case, self._counter
        most = case.length
        with counter.part("keys and values"), case.autocast():
            cache = RoomyCache(decoder_config(self._model), "cpu", most=most)
            self._run(torch.zeros(rows, num_seen - 1, dtype=torch.int64), num_seen - 1, cache)
            head = case.student.head(self._model)
        uniforms = torch.zeros(rows, dtype=torch.float64)
        with self._measured("generate", times, is_cached=True) as found:
            states = self._run(torch.zeros(rows, 1, dtype=torch.int64), num_seen, cache)
            draw_tokens(head(states[:, -1]), uniforms, case.sampling)
        return found[0]

    def _run(self, input_ids: Tensor, num_seen: int, cache: RoomyCache | None = None) -> Tensor:
        if cache is None:
            cache = RoomyCache(decoder_config(self._model), "cpu", most=self._case.length)
        mask = torch.ones(len(input_ids), num_seen, dtype=torch.int64)
        positions = torch.zeros_like(input_ids)
        return body_states(self._model, input_ids, mask, positions, cache)

    # -------------------------------------------------------------------------------------------------------- training

    def _training(self) -> Iterator[Phase]:
        """The largest micro-batch; as many times as the step's rollouts fill it."""
        case, counter = self._case, self._counter
        times = case.num_rollouts / case.rows
        batch = micro_batch(case)

        def relabel(weight: Tensor) -> None:
            counter.assign(weight.grad, "gradients")

        for each in self._trained:
            each.register_post_accumulate_grad_hook(relabel)  # type: ignore[no-untyped-call]
        scores = None
        if self._teacher is not None and case.request is not None:
            with self._measured("teacher", times) as found:
                scores = self._teacher.score(batch, case.request)
            yield found[0]
            if (kept := scores.hidden()) is not None:
                self._scores_bytes = int((times - 1) * _size(kept[0]))
        with self._measured("student", times) as found:
            hidden = case.student.hidden_states(self._model, batch)
        forward = found[0]
        loss, gradient = self._loss(hidden.detach(), batch, scores, times)
        with self._measured("student", times) as found:
            hidden.backward(gradient)  # type: ignore[no-untyped-call]
        parts = [forward, loss, found[0]]
        yield Phase(
            "student",
            max(parts, key=lambda part: part.total).peak,
            *(sum(getattr(part, name) for part in parts) for name in ("seconds", "flops", "bytes", "num_calls")),
        )

    def _loss(
        self, hidden: Tensor, batch: MicroBatch, scores: TeacherScores | None, times: float
    ) -> tuple[Phase, Tensor]:
        """The loss, and the gradient of all hidden states.

        Further chunks take as long and use the memory of the first one. A chunk is many blocks of a few rows, all
        alike: two numbers of blocks tell what all of them hold and take.
        """
        case, num_all = self._case, len(hidden)
        num_tokens = min(num_all, case.objective.chunk_tokens)
        gradient = torch.empty_like(hidden)
        few = max(4, _ENTRIES // case.student.tokenizer.vocab_size)
        if num_tokens <= 2 * few:
            return self._loss_of(num_tokens, hidden, batch, scores, times * num_all / num_tokens), gradient
        some = self._loss_of(few, hidden, batch, scores, 1.0)
        if case.num_micro_batches == 1:
            for each in self._trained:
                each.grad = None
        more = self._loss_of(2 * few, hidden, batch, scores, 1.0)
        peak = {part: _line(some.peak.get(part, 0), more.peak[part], num_tokens / few) for part in more.peak}
        work = [
            times * _line(getattr(some, name), getattr(more, name), num_all / few)
            for name in ("seconds", "flops", "bytes", "num_calls")
        ]
        return Phase("student", {part: int(size) for part, size in peak.items()}, *work), gradient

    def _loss_of(
        self, num_tokens: int, hidden: Tensor, batch: MicroBatch, scores: TeacherScores | None, times: float
    ) -> Phase:
        case = self._case
        chunk = hidden[:num_tokens].clone().requires_grad_()
        with self._measured("student", times) as found, self._counter.part("loss"):
            losses = compare_in_chunks(
                chunk,
                case.student.head(self._model),
                case.objective,
                None if scores is None else scores.slice(0, num_tokens),
                batch.tokens[slice(0, num_tokens)],
                asked=case.request,
                facts_k=case.facts_k,
                counts_alike=case.counts_alike,
            ).losses
            losses.sum().backward()  # type: ignore[no-untyped-call]
        return found[0]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gathered(model: nn.Module, *, only_trained: bool = False) -> int:
    """Bytes of all that is in no list of layers, and of the largest layer in one."""
    size_of = {id(each): _size(each) for each in model.parameters() if each.requires_grad or not only_trained}
    layers = [layer for part in model.modules() if isinstance(part, nn.ModuleList) for layer in part]
    inside = [{id(each) for each in layer.parameters()} & size_of.keys() for layer in layers]
    outside = size_of.keys() - set().union(*inside)
    return sum(size_of[each] for each in outside) + max((sum(size_of[i] for i in each) for each in inside), default=0)


def _line(at_one: float, at_two: float, place: float) -> float:
    """Where the line through two points is at a third."""
    return at_one + (at_two - at_one) * (place - 1)
