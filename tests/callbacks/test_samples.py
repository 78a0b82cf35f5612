from dataclasses import replace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.color import Color
from rich.style import Style
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import LetterTask, make_data, make_module, make_trainer

from opd_lightning.callbacks.samples import COLUMNS, PrintSamples, coloured_response, divergence_colours, log_samples
from opd_lightning.interfaces import Task
from opd_lightning.methods.uni_opd_data import left_untrained
from opd_lightning.rollouts.on_policy import OnPolicy


def test_colour_grows_with_the_divergence():
    assert divergence_colours(0.0) == divergence_colours(-0.1) == divergence_colours(0.04) == ""
    assert divergence_colours(float("nan")) == ""
    assert divergence_colours(7.0) == divergence_colours(1.0) == "rgb(255,255,255) on rgb(200,0,0)"
    reds = [Style.parse(divergence_colours(step / 10)).bgcolor.triplet for step in range(1, 11)]
    assert reds == sorted(reds)
    assert all(green == blue for _, green, blue in reds)


def luminance(colour: Color):
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour.triplet.normalized]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


@pytest.mark.parametrize("divergence", [0.05, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0])
def test_tokens_can_be_read_on_their_colour_whatever_the_screens_own_is(divergence):
    style = Style.parse(divergence_colours(divergence))
    dark, light = sorted([luminance(style.color), luminance(style.bgcolor)])
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.2, level AA


def test_samples_show_prompt_answer_reward_and_loss(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, capsys):
    samples = PrintSamples(every_n_steps=2, num_samples=1)
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    make_trainer(tmp_path, 3, callbacks=[samples]).fit(module, make_data())
    text = capsys.readouterr().out
    assert text.count("reward") == 2  # steps 1 and 3
    assert "step 1  train/" in text
    assert "step 3  train/" in text
    assert "say" in text
    assert "loss/token" in text


class LeavesOut(OnPolicy):
    def share(self, asked, graded, seed):
        rollouts = [left_untrained(graded.rollouts[0]), *graded.rollouts[1:]]
        return replace(graded, rollouts=[replace(each, seed=42) for each in rollouts])  # as a file's column may say


def test_an_answer_that_a_source_leaves_out_is_said_to_be(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, capsys):
    trainer = make_trainer(tmp_path, 1, callbacks=[PrintSamples(num_samples=1)])
    trainer.fit(make_module(tiny_qwen3_folder, tiny_teacher_folder), make_data(source=LeavesOut()))
    text = capsys.readouterr().out
    assert "  left out" in text and "nan" not in text and "loss/token" not in text


class Questions(Task):
    def problems(self, split):
        return LetterTask().problems(split)


def test_a_task_without_answers_has_no_reward_to_show(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, capsys):
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(tmp_path, 1, callbacks=[PrintSamples(num_samples=1)], logger=logger)
    trainer.fit(make_module(tiny_qwen3_folder, tiny_teacher_folder), make_data(task=Questions()))
    assert "step 1  train/" in (text := capsys.readouterr().out) and "reward" not in text
    found = EventAccumulator(logger.log_dir).Reload().Tensors("samples/text_summary")
    assert b"response: " in (logged := found[0].tensor_proto.string_val[0]) and b"reward" not in logged


def test_every_token_is_shown_with_its_own_colour(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    make_trainer(tmp_path, 1).fit(module, make_data())
    rollout = module.last_rollouts[0]
    divergences = torch.linspace(0, 1, len(rollout.response_ids))
    text = coloured_response(module.spec.tokenizer, rollout, divergences)
    assert [str(span.style) for span in text.spans] == [c for d in divergences if (c := divergence_colours(float(d)))]


def test_tokens_that_others_wrote_are_not_coloured(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    make_trainer(tmp_path, 1).fit(module, make_data())
    rollout = replace(module.last_rollouts[0], response_ids=torch.tensor([9, 10, 11]))
    rollout = replace(rollout, student_wrote=torch.tensor([True, False, True]))
    text = coloured_response(module.spec.tokenizer, rollout, torch.ones(2))
    assert [(span.start, span.end) for span in text.spans] == [(0, 1), (2, 3)]


@pytest.mark.parametrize("argument", ["every_n_steps", "num_samples"])
def test_impossible_numbers_are_refused(argument):
    with pytest.raises(ValueError, match=f"PrintSamples.{argument}: expected an integer of at least 1, got 0"):
        PrintSamples(**{argument: 0})


def test_what_a_model_or_a_file_says_cannot_steer_the_terminal(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, capsys, monkeypatch
):
    class Hostile(LetterTask):
        def problems(self, split):
            return [replace(problem, uid=f"\x1b[2J{problem.uid}") for problem in super().problems(split)]

    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    decode = type(module.spec.tokenizer).decode
    monkeypatch.setattr(type(module.spec.tokenizer), "decode", lambda *a, **k: "\x1b]0;title\x07" + decode(*a, **k))
    make_trainer(tmp_path, 1, callbacks=[PrintSamples()]).fit(module, make_data(task=Hostile()))
    text = capsys.readouterr().out
    assert "\\x1b[2Jtrain/" in text and "\\x1b]0;title\\x07" in text
    assert "\x1b" not in text and "\x07" not in text


def test_samples_reach_tensorboard_and_leave_other_loggers_alone(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    loggers = [TensorBoardLogger(tmp_path, name="", version=""), CSVLogger(tmp_path, name="", version="csv")]
    make_trainer(tmp_path, 3, callbacks=[PrintSamples(2)], logger=loggers).fit(module, make_data())
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    first, second = events.Tensors("samples/text_summary")
    assert (first.step, second.step) == (1, 3)
    text = first.tensor_proto.string_val[0].decode()
    assert "    problem: train/" in text and "    reward: " in text and "    response: " in text


def test_samples_reach_loggers_with_tables_and_with_text_files():
    """W&B and MLflow are known by the methods they document; neither is a dependency."""

    class Table:
        def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
            self.got = key, columns, data, step

    class Files:
        run_id = "run7"

        def __init__(self):
            self.experiment = self

        def log_text(self, run_id, text, artifact_file):
            self.got = run_id, text, artifact_file

    row = [3, "train/0", "say a", "a", 1.0, 0.25, 1]
    table, files = Table(), Files()
    for logger in (table, files):
        log_samples(logger, [row], step=3)
    assert table.got == ("samples", COLUMNS, [row], 3)
    assert files.got[0] == "run7" and files.got[2] == "samples/step_000003.txt"
    assert "problem: train/0\nprompt: say a\nresponse: a\nreward: 1.0" in files.got[1]
