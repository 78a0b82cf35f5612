"""What only a GPU can show. Run them with `pytest -m gpu -n 0`, or as a part of `python benchmarks/gpu_suite.py`."""

import pytest
import torch
from gpu_suite_loss import Heads, Material, errors_of
from toys import adamw, make_data, make_module, make_trainer, weights_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_GPU = {"accelerator": "gpu", "devices": 1}
PARTS = {"between_steps", "teacher", "student", "optimizer"}


@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_the_loss_and_its_gradients_are_those_of_float64_on_the_cpu(precision, most):
    material = Material(Heads(3001, 64, 96, 200), torch.device("cuda"), precision)
    assert max(errors_of(material).values()) < most


def test_a_fit_in_mixed_precision_learns_and_says_what_memory_it_took(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, optimizer=adamw, measure_memory=True)
    trainer = make_trainer(tmp_path, 8, precision="bf16-mixed", **ON_GPU)
    trainer.fit(module, make_data())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert all(weight.dtype == torch.float32 for weight in weights_of(module).values())
    assert all(torch.isfinite(weight).all() for weight in weights_of(module).values())
    assert logged["train/skipped_steps"] == 0 and logged["train/weight_version"] == 8
    memory = {name.rpartition("/")[2]: gb for name, gb in logged.items() if "memory_gb" in name}
    assert memory.keys() == PARTS and all(0 < gb < 1 for gb in memory.values())


def test_stop_and_resume_is_one_run_up_to_the_order_of_sums(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    def run(max_steps, **options):
        module = make_module(tiny_qwen3_folder, tiny_teacher_folder, optimizer=adamw)
        trainer = make_trainer(tmp_path, max_steps, **ON_GPU)
        trainer.fit(module, make_data(), **options)
        return module, trainer

    whole, _ = run(5)
    _, stopped = run(2)
    stopped.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, _ = run(5, ckpt_path=tmp_path / "stop.ckpt")
    expected = weights_of(whole)
    for name, weight in weights_of(resumed).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-4)  # a step moves weights by 1e-2
