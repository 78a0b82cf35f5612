import pytest
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from toys import make_data, make_module, make_trainer

from opd_lightning.objectives import NLL
from opd_lightning.training.checks import check_strategy


def test_a_strategy_that_cuts_the_student_up_is_refused_before_a_weight_is_loaded(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder
):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    trainer = make_trainer(tmp_path, 1, strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1))
    with pytest.raises(ValueError, match=r"strategy: ModelParallelStrategy cuts .*Use a single device \(auto\) or ddp"):
        trainer.fit(module, make_data())
    assert module.student is None


@pytest.mark.parametrize("strategy", ["auto", "ddp", DDPStrategy(static_graph=True)])
def test_whole_copies_of_the_student_are_fine(strategy):
    check_strategy(Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False))


def test_imitating_oneself_is_warned_about(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, objective=NLL())
    with pytest.warns(UserWarning, match=r"NLL imitates the student's own answers .* Set data.source"):
        make_trainer(tmp_path, 1).fit(module, make_data())
