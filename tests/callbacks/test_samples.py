import io

import pytest
import torch
from rich.console import Console
from toys import make_data, make_module, make_trainer

from opd_lightning.callbacks.samples import PrintSamples, coloured_response, divergence_colour


def test_colour_grows_with_the_divergence():
    assert divergence_colour(0.0) == "on rgb(0,0,0)"
    assert divergence_colour(0.5) == "on rgb(100,0,0)"
    assert divergence_colour(7.0) == divergence_colour(1.0) == "on rgb(200,0,0)"
    assert divergence_colour(-0.1) == "on rgb(0,0,0)"  # rounding


def test_samples_show_prompt_answer_reward_and_loss(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    screen = io.StringIO()
    samples = PrintSamples(every_n_steps=2, num_samples=1, console=Console(file=screen, width=200))
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    make_trainer(tmp_path, 3, callbacks=[samples]).fit(module, make_data())
    text = screen.getvalue()
    assert text.count("reward") == 2  # steps 1 and 3
    assert "step 1  train/" in text
    assert "step 3  train/" in text
    assert "say" in text
    assert "loss/token" in text


def test_every_token_is_shown_with_its_own_colour(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    make_trainer(tmp_path, 1).fit(module, make_data())
    rollout = module.last_rollouts[0]
    divergences = torch.linspace(0, 1, len(rollout.response_ids))
    text = coloured_response(module.spec.tokenizer, rollout, divergences)
    assert [str(span.style) for span in text.spans] == [divergence_colour(float(d)) for d in divergences]


@pytest.mark.parametrize("argument", ["every_n_steps", "num_samples"])
def test_impossible_numbers_are_refused(argument):
    with pytest.raises(ValueError, match=f"PrintSamples.{argument}: expected an integer of at least 1, got 0"):
        PrintSamples(**{argument: 0})
