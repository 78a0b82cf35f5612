"""What a run says of itself, what another run may do with its checkpoint, and this run's optimiser put into it."""

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from toys import adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning.backends.hf import HFTeacher
from opd_lightning.backends.vllm.server import Connection, VLLMServerTeacher
from opd_lightning.interfaces import Sampling
from opd_lightning.objectives import DivergenceObjective, StudentTopK
from opd_lightning.selection import DifficultyPool
from opd_lightning.training.resuming import check_optimizer, check_resume, describe_settings
from opd_lightning.training.schedules import WarmupDecay


@pytest.fixture
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return tiny_qwen3_folder, tiny_teacher_folder


# ------------------------------------------------------------------------------------------------- what a setting is


@dataclass
class Inner:
    rate: float = 0.5


class Outer:
    def __init__(self, inner, names=("a",), path=Path("/x"), api_key="secret", kind=int, weight=None, late=None):
        self.inner, self.names, self._path, self.api_key, self.kind = inner, names, path, api_key, kind
        self.weight = torch.zeros(2)
        self.num_calls = 7
        self.late = self  # a circle


def test_a_setting_that_is_gone_is_said():
    with pytest.warns(
        UserWarning, match=r"model\.updates_per_batch: the checkpoint was written with 2, and this version"
    ):
        check_resume({"model.updates_per_batch": 2, "data.rollouts_per_prompt": 1}, {"data.rollouts_per_prompt": 1})


def test_an_object_is_its_class_and_its_arguments():
    described = describe_settings(Outer([Inner(), None]))
    assert described == {
        "class": f"{__name__}.Outer",
        "inner": [{"class": f"{__name__}.Inner", "rate": 0.5}, None],
        "names": ["a"],
        "path": "/x",
        "kind": "builtins.int",
        "weight": {"class": "torch.Tensor"},
        "late": {"class": f"{__name__}.Outer"},
    }
    assert describe_settings(functools.partial(adamw, lr=1)) == {"class": "toys.adamw", "lr": 1}


def test_shipped_objects_say_what_matters_and_no_secret(tmp_path):
    teacher = describe_settings(HFTeacher("sandbox:teacher", dtype="float32"))
    assert teacher["dtype"] == "float32" and teacher["source"]["path"] == "sandbox:teacher"
    connection = Connection(urls=["http://me:hush@localhost:8000"], api_key="hush")
    server = describe_settings(VLLMServerTeacher(connection, max_top_k=4))
    assert server["max_top_k"] == 4 and server["connection"]["urls"] == ["http://localhost:8000"]
    assert "hush" not in str(server)
    assert describe_settings(DivergenceObjective(StudentTopK(4)))["support"]["k"] == 4
    torch.save([teacher, server], tmp_path / "plain")
    assert torch.load(tmp_path / "plain", weights_only=True) == [teacher, server]


# ------------------------------------------------------------------------------------------- what a resume may change


def stopped_run(tmp_path, folders, **data):
    trainer = make_trainer(tmp_path, 2)
    trainer.fit(make_module(*folders, optimizer=adamw), make_data(**data))
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    return tmp_path / "stop.ckpt"


def resume(tmp_path, folders, path, *, data=None, teacher=None, **options):
    student, own_teacher = folders
    module = make_module(student, teacher or own_teacher, **({"optimizer": adamw} | options))
    make_trainer(tmp_path, 3).fit(module, make_data(**(data or {})), ckpt_path=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": DivergenceObjective(StudentTopK(4))}, r"model\.objective\.support: .* with .*FullVocabulary"),
        ({"data": {"rollouts_per_prompt": 3}}, r"data\.rollouts_per_prompt: .* with 2, this run has 3\. Resume with"),
        ({"lr_scheduler": WarmupDecay}, r"lr_scheduler: .* with None, this run has WarmupDecay.*override_optimizer_on"),
    ],
    ids=["objective", "rollouts", "scheduler"],
)
def test_what_changes_the_meaning_is_refused(tmp_path, folders, change, message):
    path = stopped_run(tmp_path, folders)
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, folders, path, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_clip_norm": 0.5}, r"model\.gradient_clip_norm: the checkpoint was written with None.* has 0\.5"),
        ({"data": {"sampling": Sampling(max_new_tokens=5)}}, r"data\.sampling\.max_new_tokens: .* with 8.* has 5"),
        ({"teacher": "student"}, r"model\.teacher\.source\.path: .*tiny_teacher.* has .*tiny_qwen3"),
        ({"optimizer": lambda p: torch.optim.AdamW(p, lr=1)}, r"init_args\.lr: a resumed run keeps .* 0\.01; this"),
    ],
    ids=["clip", "sampling", "teacher", "learning rate"],
)
def test_what_may_change_is_said_with_both_values(tmp_path, folders, change, message):
    path = stopped_run(tmp_path, folders)
    if change.get("teacher"):
        change = {"teacher": folders[0]}
    with pytest.warns(UserWarning, match=message):
        resume(tmp_path, folders, path, **change)


def test_the_settings_of_a_selector_are_compared_before_it_has_learnt(tmp_path, folders):
    path = stopped_run(tmp_path, folders, selector=DifficultyPool())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "data.selector")
        resume(tmp_path, folders, path, data={"selector": DifficultyPool()})


def test_the_same_run_says_nothing(tmp_path, folders):
    path = stopped_run(tmp_path, folders)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r"(model|data|trainer)\.")
        resume(tmp_path, folders, path)


def test_precision_and_class_changes_are_compared_by_name():
    with pytest.warns(UserWarning, match=r"trainer\.precision: .* with 32-true, this run has bf16-mixed"):
        check_resume({"trainer.precision": "32-true"}, {"trainer.precision": "bf16-mixed"})
    saved, current = ({"model.teacher": {"class": name, "k": 1}} for name in ("a.A", "b.B"))
    with pytest.warns(UserWarning, match=r"model\.teacher: .* with a\.A, this run has b\.B"):
        check_resume(saved, current)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda optimizer, length: WarmupDecay(optimizer, decay="linear", total_steps=length), "total_steps"),
        (lambda optimizer, length: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=length), "T_max"),
    ],
    ids=["own", "torch"],
)
def test_another_schedule_is_said_to_be_ignored(make, name):
    saved, current = (check_optimizer(adamw, lambda optimizer, n=n: make(optimizer, n)) for n in (10, 20))
    expected = rf"lr_scheduler\.init_args\.{name}: a resumed run keeps the checkpoint's 10; this run's 20 is ignored"
    with pytest.warns(UserWarning, match=expected):
        check_resume(saved, current)
    with warnings.catch_warnings(action="error"):
        check_resume(saved, dict(saved))


def test_older_checkpoints_that_do_not_say_are_accepted():
    with pytest.warns(UserWarning, match=r"model\.objective\.new: an older checkpoint, which does not say"):
        check_resume({"model.objective": {"class": "O"}}, {"model.objective": {"class": "O", "new": 1}})
    with pytest.warns(UserWarning, match=r"model\.teacher: an older checkpoint"):
        check_resume({}, {"model.teacher": {"class": "T"}})


def test_weights_alone_are_not_resumed(tmp_path, folders):
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(make_module(*folders), make_data())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"the checkpoint holds weights only .*export, then student\.path"):
        make_trainer(tmp_path, 2).fit(make_module(*folders), make_data(), ckpt_path=tmp_path / "weights.ckpt")
    validator = make_trainer(tmp_path, 1, limit_val_batches=1.0)
    validator.validate(make_module(*folders), make_data(), ckpt_path=tmp_path / "weights.ckpt", verbose=False)


# ------------------------------------------------------------------------------------ another learning rate, if asked


def scheduled(rate, decay="linear", **options):
    return {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0),
        "lr_scheduler": lambda optimizer: WarmupDecay(optimizer, decay=decay, total_steps=10),
        **options,
    }


def run(tmp_path, folders, steps, ckpt_path=None, **options):
    module = make_module(*folders, **options)
    trainer = make_trainer(tmp_path, steps)
    trainer.fit(module, make_data(), ckpt_path=ckpt_path)
    return module, trainer


def test_with_the_same_settings_the_override_changes_nothing(tmp_path, folders):
    whole, _ = run(tmp_path, folders, 4, **scheduled(1e-2))
    _, trainer = run(tmp_path, folders, 2, **scheduled(1e-2))
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    for override in (False, True):
        options = scheduled(1e-2, override_optimizer_on_resume=override)
        resumed, _ = run(tmp_path, folders, 4, tmp_path / "stop.ckpt", **options)
        assert all(torch.equal(weight, weights_of(whole)[name]) for name, weight in weights_of(resumed).items())


@pytest.mark.parametrize("decay", ["linear", "constant"])
def test_the_new_learning_rate_is_that_of_this_runs_schedule_at_this_step(tmp_path, folders, decay):
    _, trainer = run(tmp_path, folders, 2, **scheduled(1e-2))
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    _, expected = run(tmp_path, folders, 3, **scheduled(1e-4, decay))
    options = scheduled(1e-4, decay, override_optimizer_on_resume=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r"model\.")
        _, resumed = run(tmp_path, folders, 3, tmp_path / "stop.ckpt", **options)
    (group,), (same,) = (trainer.optimizers[0].param_groups for trainer in (resumed, expected))
    assert group["lr"] == same["lr"] and group["initial_lr"] == same["initial_lr"] == 1e-4
    state = next(iter(resumed.optimizers[0].state.values()))
    assert state["step"] == 3  # the moments went on


def test_a_scheduler_may_come_and_go_under_the_override(tmp_path, folders):
    _, trainer = run(tmp_path, folders, 2, **scheduled(1e-2))
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    options = {"optimizer": adamw, "override_optimizer_on_resume": True}
    _, trainer = run(tmp_path, folders, 3, tmp_path / "with.ckpt", **options)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    _, trainer = run(
        tmp_path, folders, 4, tmp_path / "without.ckpt", **scheduled(1e-2, override_optimizer_on_resume=True)
    )
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.6)
