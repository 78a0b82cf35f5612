import warnings
from dataclasses import replace

import pytest
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from toys import LetterTask, make_data, make_module, make_trainer

from opd_lightning import BaseModelTeacher, HFStudent, LoraSettings, Student
from opd_lightning.backends.hf import CrossTokenizerTeacher, HFTeacher
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.methods import AntiSelfDistillation, BalancedMarks, Judge, LongReturn, MarginShift, RubricObjective
from opd_lightning.objectives import NLL, SampledTokenObjective
from opd_lightning.rollouts.horizon import ConstantHorizon
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.rollouts.teacher_mixed import TeacherMixed
from opd_lightning.teachers import Routed
from opd_lightning.training.checks import check_strategy


def test_a_strategy_that_cuts_the_student_up_is_refused_before_a_weight_is_loaded(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder
):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    trainer = make_trainer(tmp_path, 1, strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1))
    with pytest.raises(ValueError, match=r"strategy: Lightning's ModelParallelStrategy .* Use fsdp2 \(opd_lightning"):
        trainer.fit(module, make_data())
    assert module.student is None


class NotSaidHow(HFStudent):
    shard = Student.shard


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (NotSaidHow, None, r"trainer.strategy: fsdp2 cuts the student up, and NotSaidHow .*Define .* or use ddp"),
        (HFStudent, BaseModelTeacher(), r"model.teacher: BaseModelTeacher runs the student itself.* Use HFTeacher"),
    ],
)
def test_what_cannot_be_cut_up_is_refused_before_a_weight_is_loaded(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, student, teacher, message
):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, teacher_object=teacher)
    module.spec = student(str(tiny_qwen3_folder), lora=LoraSettings())
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, 1, strategy="fsdp2").fit(module, make_data())
    assert module.student is None


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_teacher_is_cut_up_with_the_student_only(strategy, tiny_teacher_folder):
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)
    teacher = Routed({"0": HFTeacher(str(tiny_teacher_folder), sharded=True)}, "level")
    with pytest.raises(ValueError, match=r"model.teacher.sharded: .* by trainer.strategy: fsdp2, and .* leave sharded"):
        check_strategy(trainer, teacher)


@pytest.mark.parametrize("strategy", ["auto", "ddp", DDPStrategy(static_graph=True), "fsdp2"])
def test_whole_copies_and_our_shards_are_fine(strategy):
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)
    check_strategy(trainer, None)


def test_imitating_oneself_is_warned_about(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, objective=NLL())
    with pytest.warns(UserWarning, match=r"NLL imitates the student's own answers .* Set data.source"):
        make_trainer(tmp_path, 1).fit(module, make_data())
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, objective=NLL(), max_tokens_per_micro_batch=2)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError, match="cannot hold one rollout"):
        warnings.simplefilter("always")
        make_trainer(tmp_path, 1).fit(module, make_data(source=TeacherMixed()))
    assert not [each for each in caught if "imitates" in str(each.message)]  # the teacher has a say in these


class Unlabelled(LetterTask):
    """Held-out problems have no columns."""

    def problems(self, split):
        found = super().problems(split)
        return found if split == "train" else [replace(problem, columns={}) for problem in found]


def test_training_problems_without_a_teacher_are_refused_before_a_weight_is_loaded(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder
):
    def module(**options):
        teacher = Routed({"0": HFTeacher(str(tiny_teacher_folder))}, "level", **options)
        return make_module(tiny_qwen3_folder, tiny_teacher_folder, teacher_object=teacher)

    unrouted = module()
    with pytest.raises(ValueError, match=r"problem 'train/1' has 1 in the column 'level'.*Routes: '0'"):
        make_trainer(tmp_path, 1).fit(unrouted, make_data())
    assert unrouted.student is None
    # nobody asks the teacher about held-out problems that are marked
    routes = dict.fromkeys("012", "0")
    make_trainer(tmp_path, 1, limit_val_batches=1).fit(module(routes=routes), make_data(task=Unlabelled()))


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}


class Unmarked(LetterTask):
    """Every third problem has no mark."""

    def can_grade(self, problem):
        return problem.columns["level"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": ConstantHorizon(2)}, r"^data\.horizon: BalancedMarks reads .* Set horizon: null"),
        ({"task": Unmarked()}, r"^data\.task: BalancedMarks reads .* Unmarked does not .* or another source"),
    ],
)
def test_a_source_that_reads_marks_refuses_answers_without_before_a_weight_is_loaded(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, settings, message
):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, 1).fit(module, make_data(source=BalancedMarks(), **settings))
    assert module.student is None


@pytest.mark.parametrize("settings", [{"offload": True}, {"sharded": None}, {"quantization_config": NF4}, None])
def test_a_teacher_that_cannot_answer_is_refused_before_a_weight_is_loaded(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, settings
):
    teacher = None if settings is None else HFTeacher(str(tiny_teacher_folder), **settings)
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, teacher_object=teacher, objective=LongReturn())
    module.teacher = teacher
    if settings is None:
        module.objective = NLL()
    strategy = "fsdp2" if settings == {"sharded": None} else "auto"
    with pytest.raises(ValueError, match=r"^data\.source: TeacherMixed needs a teacher .* offload: false"):
        make_trainer(tmp_path, 1, strategy=strategy).fit(module, make_data(source=TeacherMixed()))
    assert module.student is None


def test_engines_that_do_not_fit_a_source_need_not_be_installed(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, objective=LongReturn())
    with pytest.raises(ValueError, match=r"^data\.engine: TeacherMixed .* VLLMColocatedEngine draws from one"):
        make_trainer(tmp_path, 1).fit(module, make_data(source=TeacherMixed(), engine=VLLMColocatedEngine()))


def test_a_teacher_that_can_answer_is_one_that_says_how(tiny_teacher_folder):
    plain = HFTeacher(str(tiny_teacher_folder))
    assert plain.is_here(False) and not plain.is_here(True)
    assert HFTeacher(str(tiny_teacher_folder), sharded=False).is_here(True)
    assert not Routed({"0": plain}, "level").is_here(False)
    assert not CrossTokenizerTeacher(str(tiny_teacher_folder)).is_here(False)


class Forgetful(OnPolicy):
    """As behind a cut, of which an engine does not tell how likely the tokens were before it."""

    def knows_log_probs(self, sampling):
        return False


class OfOthers(Forgetful):
    staleness = None


@pytest.mark.parametrize(
    ("objective", "source", "remedy"),
    [
        (SampledTokenObjective(), OfOthers(), r"Take an objective that does without, such as DivergenceObjective"),
        (
            SampledTokenObjective(allow_biased_sampling=True),
            Forgetful(),
            r"top_k to 0, or objective\.importance: null\.",
        ),
        (SampledTokenObjective(advantage=MarginShift()), Forgetful(), r"sampling\.top_k to 0\.$"),
        (LongReturn(), Forgetful(), r"sampling\.top_k to 0\.$"),
    ],
)
def test_what_to_do_about_unknown_log_probs_is_something_that_helps(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, objective, source, remedy
):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, objective=objective)
    with pytest.raises(ValueError, match=rf"^model\.objective: .* needs the log-prob.*{remedy}"):
        make_trainer(tmp_path, 1).fit(module, make_data(source=source))


class NeverAsked(Judge):
    scores = None


BY_MARKS, BY_JUDGE = SampledTokenObjective(advantage=AntiSelfDistillation()), RubricObjective(NeverAsked())


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (BY_MARKS, {"rollouts_per_prompt": 1}, r"^data\.rollouts_per_prompt: AntiSelf.* Set it to 2 or more"),
        (BY_JUDGE, {"rollouts_per_prompt": 1}, r"^data\.rollouts_per_prompt: Rubric.* Set it to 2 or more"),
        (BY_MARKS, {"horizon": ConstantHorizon(2)}, r"^data\.horizon: .* Set horizon: null"),
    ],
)
def test_answers_that_cannot_be_compared_are_refused_before_a_weight_is_loaded(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, objective, settings, message
):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, objective=objective)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, 1).fit(module, make_data(**settings))
    assert module.student is None
