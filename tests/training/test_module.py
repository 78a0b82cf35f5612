import copy
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from toys import LetterTask, adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning.backends.hf import HFEngine, HFStudent, LoraSettings
from opd_lightning.interfaces import Sampling
from opd_lightning.objectives import (
    DivergenceObjective,
    FullVocabulary,
    Intersection,
    StudentTopK,
    TeacherTopK,
    Union,
)
from opd_lightning.rollouts import comparison
from opd_lightning.rollouts.batching import collate
from opd_lightning.teachers import BaseModelTeacher, MovingAverageTeacher, PrivilegedTeacher
from opd_lightning.training.checkpoints import build_student
from opd_lightning.training.schedules import WarmupDecay


class Recorder(Callback):
    """Keeps what happened at each step."""

    def __init__(self):
        self.batches, self.weights, self.metrics, self.outputs = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)
        self.weights.append(weights_of(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append(dict(trainer.callback_metrics))
        self.outputs.append(outputs)


def run(tmp_path, student, teacher, *, steps=1, module=None, data=None, **options):
    module = module if module is not None else make_module(student, teacher)
    recorder = Recorder()
    trainer = make_trainer(tmp_path, steps, callbacks=[recorder, *options.pop("callbacks", [])], **options)
    trainer.fit(module, data if data is not None else make_data())
    return module, recorder


@pytest.fixture
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return tiny_qwen3_folder, tiny_teacher_folder


def reference_step(recorder, student_folder, teacher_folder, vocab_size):
    """Weights after one SGD step of size 1 on the full-vocabulary reverse KL, from scratch in float64."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float64)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float64)
    total, count = 0.0, 0
    for rollout in recorder.batches[0].rollouts:
        ids = torch.cat([rollout.prompt_ids, rollout.response_ids])[None]
        at = slice(len(rollout.prompt_ids) - 1, -1)
        p = student(ids).logits[0, at, :vocab_size].log_softmax(-1)
        with torch.no_grad():
            q = teacher(ids).logits[0, at, :vocab_size].log_softmax(-1)
        total = total + (p.exp() * (p - q)).sum()
        count += len(rollout.response_ids)
    (total / count).backward()
    return {n: (p - p.grad).detach() for n, p in student.named_parameters()}, float(total / count)


def test_one_step_is_the_gradient_of_the_reverse_kl_over_all_response_tokens(tmp_path, folders):
    module, recorder = run(tmp_path, *folders)
    expected, loss = reference_step(recorder, *folders, module.spec.tokenizer.vocab_size)
    for name, weight in weights_of(module).items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert recorder.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert recorder.metrics[0]["train/reverse_kl"] == pytest.approx(loss, rel=1e-5)


def test_rollouts_of_every_step_come_from_the_weights_of_that_step(tmp_path, folders):
    module, recorder = run(tmp_path, *folders, steps=3)
    assert [batch.weight_version for batch in recorder.batches] == [0, 1, 2]
    for batch, weights in zip(recorder.batches, recorder.weights, strict=True):
        module.student.load_state_dict(weights, strict=False)
        micro_batch = collate(batch.rollouts, 0)
        logits = module.spec.head(module.student)(module.spec.hidden_states(module.student, micro_batch))
        log_probs = logits.log_softmax(-1).gather(-1, micro_batch.tokens.ids[:, None]).squeeze(-1)
        torch.testing.assert_close(log_probs, micro_batch.tokens.rollout_log_probs, rtol=1e-4, atol=1e-4)


def test_stale_rollouts_are_caught(tmp_path, folders):
    class MoveWeights(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.on_weights_moved()

    with pytest.raises(AssertionError, match="not on-policy"):
        run(tmp_path, *folders, callbacks=[MoveWeights()])


@pytest.mark.parametrize("budget", [40, 64, 100, 10_000])
def test_the_step_does_not_depend_on_the_micro_batch_cut(tmp_path, folders, budget):
    whole, _ = run(tmp_path, *folders)
    cut, _ = run(tmp_path, *folders, module=make_module(*folders, max_tokens_per_micro_batch=budget))
    for name, weight in weights_of(cut).items():
        torch.testing.assert_close(weight, weights_of(whole)[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("change", ["left padding", "reversed order"])
def test_the_gradient_does_not_depend_on_padding_side_or_order(tmp_path, folders, change, monkeypatch):

    straight, _ = run(tmp_path, *folders)
    if change == "left padding":
        monkeypatch.setattr(comparison, "collate", lambda group, pad_id: collate(group, pad_id, side="left"))
    else:
        cut = comparison.cut_by_tokens
        monkeypatch.setattr(comparison, "cut_by_tokens", lambda *args: [group[::-1] for group in cut(*args)])
    changed, _ = run(tmp_path, *folders)
    for name, weight in weights_of(changed).items():
        torch.testing.assert_close(weight, weights_of(straight)[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_student_that_equals_its_teacher_does_not_move(tmp_path, tiny_qwen3_folder):
    module, recorder = run(tmp_path, tiny_qwen3_folder, tiny_qwen3_folder)
    assert recorder.metrics[0]["train/loss"] == pytest.approx(0, abs=1e-6)
    assert recorder.metrics[0]["train/overlap_ratio"] == pytest.approx(1)
    for name, weight in weights_of(module).items():
        torch.testing.assert_close(weight, recorder.weights[0][name], rtol=0, atol=1e-6)


def test_the_teacher_is_in_no_checkpoint_and_no_optimiser(tmp_path, folders):
    module, _ = run(tmp_path, *folders)
    trainer = module.trainer
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"student"}
    in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in module.student.parameters()}
    assert len(saved["state_dict"]) == len(module.student.state_dict())


def test_training_metrics_are_complete(tmp_path, folders):
    _, recorder = run(tmp_path, *folders)
    names = {name.removeprefix("train/") for name in recorder.metrics[0]}
    assert names >= {
        *("loss", "reverse_kl", "forward_kl", "overlap_ratio", "overlap_mass_student", "overlap_mass_teacher"),
        *("overlap_advantage", "overlap_reverse_kl", "student_entropy", "teacher_entropy", "entropy_gap", "grad_norm"),
        *("accuracy", "response_length", "truncation_rate", "repetition_rate", "padding_share", "skipped_steps"),
        *("tokens_per_second/generate", "tokens_per_second/teacher", "tokens_per_second/student", "learning_rate"),
        *("seconds/generate", "seconds/sync", "seconds/grade", "seconds/teacher", "seconds/student"),
        *("rollout_mismatch", "rollout_mismatch_max", "weight_version"),
    }
    assert recorder.metrics[0]["train/rollout_mismatch_max"] < 1e-3


def test_token_losses_belong_to_their_rollouts(tmp_path, folders):
    _, recorder = run(tmp_path, *folders)
    rows = [(trained.rollout, trained.losses) for trained in recorder.outputs[0]["facts"].rollouts]
    assert {rollout.seed for rollout, _ in rows} == {rollout.seed for rollout in recorder.batches[0].rollouts}
    assert all(len(losses) == len(rollout.response_ids) for rollout, losses in rows)
    total = sum(float(losses.sum()) for _, losses in rows) / sum(len(losses) for _, losses in rows)
    assert total == pytest.approx(float(recorder.metrics[0]["train/loss"]), rel=1e-5)


class NanAt(DivergenceObjective):
    """Loses its mind at some optimiser steps."""

    def __init__(self, calls):
        super().__init__()
        self.calls, self.count = calls, 0

    def token_losses(self, student_logits, *args):
        self.count += 1
        losses = super().token_losses(student_logits, *args)
        return losses * torch.nan if self.count - 1 in self.calls else losses


def test_a_step_with_a_non_finite_gradient_is_skipped_and_counted(tmp_path, folders):
    module = make_module(*folders, objective=NanAt({1}))
    with pytest.warns(UserWarning, match="Step skipped: the gradient norm is nan"):
        _, recorder = run(tmp_path, *folders, module=module, steps=2)
    assert [metrics["train/skipped_steps"] for metrics in recorder.metrics] == [0, 1, 1]  # max_steps counts real steps
    assert module.weight_version == 2
    assert all(torch.equal(recorder.weights[1][name], weight) for name, weight in recorder.weights[2].items())


def test_a_teacher_that_follows_moves_with_each_step_that_was_made_and_is_saved(tmp_path, folders):
    teacher = PrivilegedTeacher(MovingAverageTeacher(0.5), "{question} {answer}")
    module = make_module(*folders, objective=NanAt({1}), teacher_object=teacher)
    with pytest.warns(UserWarning, match="Step skipped"):
        _, recorder = run(tmp_path, *folders, module=module, steps=2)
    module.trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["opd_lightning"]["teacher"]["average"]
    first, second, _ = recorder.weights
    assert any(not torch.equal(second[name], weight) for name, weight in first.items())
    for name, last in weights_of(module).items():
        average = first[name].lerp(second[name], 0.5).lerp(last, 0.5)  # the skipped step in between does not count
        assert torch.equal(saved[name], average), name


def test_a_run_of_non_finite_gradients_stops_with_the_last_good_weights(tmp_path, folders):
    module = make_module(*folders, objective=NanAt({1, 2, 3}), max_skipped_steps=3)
    with (
        warnings.catch_warnings(),
        pytest.raises(FloatingPointError, match=r"3 steps in a row had a non-finite gradient.*start again"),
    ):
        warnings.simplefilter("ignore")
        run(tmp_path, *folders, module=module, steps=9)
    assert all(torch.isfinite(weight).all() for weight in weights_of(module).values())


def test_clipping_bounds_the_step(tmp_path, folders):
    module, recorder = run(tmp_path, *folders, module=make_module(*folders, gradient_clip_norm=0.01))
    squares = sum(((w - recorder.weights[0][n]) ** 2).sum() for n, w in weights_of(module).items())
    assert float(squares) ** 0.5 == pytest.approx(0.01, rel=1e-3)
    assert recorder.metrics[0]["train/grad_norm"] > 0.01  # the norm before clipping


def test_scheduler_steps_once_per_optimiser_step(tmp_path, folders):
    module = make_module(*folders, lr_scheduler=lambda optimizer: WarmupDecay(optimizer, warmup_steps=4))
    _, recorder = run(tmp_path, *folders, module=module, steps=3)
    assert [float(m["train/learning_rate"]) for m in recorder.metrics] == pytest.approx([0.25, 0.5, 0.75])


def test_lora_trains_only_the_adapter_and_saves_only_it(tmp_path, folders):
    lora = {"lora": LoraSettings(r=4)}
    module = make_module(*folders, student_options=lora, optimizer=adamw, teacher_object=None)
    _, recorder = run(tmp_path, *folders, module=module, steps=2)
    after = weights_of(module)
    changed = {name for name, weight in recorder.weights[0].items() if not torch.equal(weight, after[name])}
    assert changed == {name for name in after if "lora_" in name}
    module.trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert {name.removeprefix("student.") for name in saved} == changed


def test_a_lora_student_may_have_its_own_base_as_teacher(tmp_path, folders):
    module = make_module(
        *folders, student_options={"lora": LoraSettings(r=4)}, optimizer=adamw, teacher_object=BaseModelTeacher()
    )
    _, recorder = run(tmp_path, *folders, module=module, steps=2)
    assert recorder.metrics[0]["train/reverse_kl"] == pytest.approx(0, abs=1e-6)  # a fresh adapter changes nothing


def test_bf16_autocast_keeps_rollouts_and_training_in_the_same_precision(tmp_path, folders):
    module, recorder = run(tmp_path, *folders, steps=2, precision="bf16-mixed")
    assert all(weight.dtype == torch.float32 for weight in weights_of(module).values())
    assert recorder.metrics[-1]["train/rollout_mismatch"] < 0.05


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, folders):
    plain, _ = run(tmp_path, *folders)
    thrifty, _ = run(tmp_path, *folders, module=make_module(*folders, student_options={"gradient_checkpointing": True}))
    for name, weight in weights_of(thrifty).items():
        torch.testing.assert_close(weight, weights_of(plain)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "support", [StudentTopK(4), TeacherTopK(4), Intersection(16), Union(4), FullVocabulary()], ids=repr
)
def test_a_step_on_every_support_lowers_its_divergence_on_the_same_tokens(tmp_path, folders, support):
    objective = DivergenceObjective(support, chunk_tokens=16)
    module = make_module(*folders, objective=objective, optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))
    module, recorder = run(tmp_path, *folders, module=module)
    module.teacher.setup(module.spec, module.student, torch.device("cpu"))
    batches = module.make_micro_batches(recorder.batches[0].rollouts)
    with torch.no_grad():
        losses = torch.cat([c.losses for c in module.compare(batches, objective, objective.request())])
    assert losses.mean() < recorder.metrics[0]["train/loss"]


def test_validation_reports_avg_and_pass_at_n_and_each_source(tmp_path, folders):
    data = make_data(
        task=LetterTask(num_held_out=7, sources=("even", "odd")), validation_samples=3, validation_batch_size=2
    )
    trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
    results = trainer.validate(make_module(*folders), data, verbose=False)[0]
    assert results["val/num_problems"] == 7
    assert results["val/even/num_problems"] == 4
    assert 0 <= results["val/avg_at_3"] <= results["val/pass_at_3"] <= 1
    again = make_trainer(tmp_path, 1, limit_val_batches=1.0).validate(make_module(*folders), data, verbose=False)[0]
    assert again == results  # seeds depend on the problem, not on the run


def test_validation_does_not_disturb_training(tmp_path, folders):
    plain, _ = run(tmp_path, *folders, steps=3)
    watched, _ = run(
        tmp_path, *folders, steps=3, limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None
    )
    assert all(torch.equal(w, weights_of(plain)[n]) for n, w in weights_of(watched).items())


class CopyingEngine(HFEngine):
    """Generates from a copy of the weights, taken when their version is new: what an engine elsewhere does."""

    def sync(self, model, weight_version):
        if weight_version != self.weight_version:
            super().sync(copy.deepcopy(model), weight_version)


def test_validation_sees_averaged_weights_and_training_does_not(tmp_path, folders):
    options = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    seen = []
    for engine in (HFEngine(), CopyingEngine()):
        average = EMAWeightAveraging(decay=0.5)
        _, recorder = run(tmp_path, *folders, steps=4, data=make_data(engine=engine), callbacks=[average], **options)
        seen.append(([m.get("val/response_length") for m in recorder.metrics], recorder.weights))
    (live, live_weights), (copied, copied_weights) = seen
    assert live == copied
    for a, b in zip(live_weights, copied_weights, strict=True):
        assert all(torch.equal(weight, b[name]) for name, weight in a.items())


def test_student_temperature_must_be_that_of_the_rollouts(tmp_path, folders):
    with pytest.raises(ValueError, match="temperature"):
        run(tmp_path, *folders, data=make_data(sampling=Sampling(max_new_tokens=8, temperature=0.7)))


def test_the_student_description_builds_the_same_student(folders):
    spec = HFStudent(str(folders[0]), lora=LoraSettings(r=4))
    assert build_student(spec.describe()).describe() == spec.describe()


def test_limited_passes_are_refused(tmp_path, folders):
    for limit in (2, 1, 0.5):  # 1 is one batch, 1.0 all of them
        with pytest.raises(ValueError, match=r"limit_train_batches.*Set trainer.max_steps"):
            run(tmp_path, *folders, limit_train_batches=limit)


def test_fast_dev_run_trains_one_step_validates_one_batch_and_writes_nothing(tmp_path, folders):
    module, recorder = run(
        tmp_path,
        *folders,
        steps=7,
        fast_dev_run=True,
        data=make_data(validation_batch_size=2),
        enable_checkpointing=True,
    )
    assert (len(recorder.batches), module.global_step, module.weight_version) == (1, 1, 1)
    assert any(not torch.equal(weight, recorder.weights[0][name]) for name, weight in weights_of(module).items())
    assert module.trainer.callback_metrics["val/num_problems"] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_with_the_same_data_module_starts_from_the_start(tmp_path, folders):
    data = make_data()
    _, first = run(tmp_path, *folders, steps=2, data=data)
    _, second = run(tmp_path, *folders, steps=2, data=data)
    seeds = [[[rollout.seed for rollout in batch.rollouts] for batch in notes.batches] for notes in (first, second)]
    assert seeds[0] == seeds[1]


def test_only_validation_is_cut_by_its_number_of_problems(tmp_path, folders):
    data = make_data(num_validation_problems=2)
    trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
    module = make_module(*folders)
    assert trainer.validate(module, data, verbose=False)[0]["val/num_problems"] == 2
    assert trainer.test(module, data, verbose=False)[0]["test/num_problems"] == 6


def test_answers_are_counted_anew_for_another_data_module(tmp_path, folders):
    module = make_module(*folders)
    for num_samples in (2, 3):
        trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
        results = trainer.validate(module, make_data(validation_samples=num_samples), verbose=False)[0]
        assert f"val/avg_at_{num_samples}" in results
        assert not any(name.endswith("_at_2") for name in results) or num_samples == 2
