"""`opd-lightning rollout` on tiny real models: who answers, what is kept, and that a killed run goes on."""

import json
import shlex
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB_SIZE
from toys import LetterTask, make_data, make_module
from transformers import AutoModelForCausalLM

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher
from opd_lightning.commands.cli import main
from opd_lightning.commands.rollout import RolloutTrainer
from opd_lightning.interfaces import Problem, Prompt, Sampling, StepPrompts, Task
from opd_lightning.rollouts.answer_files import read_answers, read_header
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.rejection import Rejection
from opd_lightning.rollouts.stored import Stored
from opd_lightning.teachers import StoredTeacher

LOOSE = Rejection(truncated=False)


class FailingEngine(HFEngine):
    """Fails in its n-th call, and remembers what it was asked."""

    def __init__(self, calls_left=10**6):
        super().__init__()
        self.calls_left = calls_left
        self.asked = []

    def generate(self, prompts, sampling, on_rollout=None):
        if not self.calls_left:
            raise KeyboardInterrupt
        self.calls_left -= 1
        self.asked += [(prompt.problem.uid, seed) for prompt in prompts for seed in prompt.seeds]
        return super().generate(prompts, sampling)


class Ungraded(Task):
    def problems(self, split):
        return [Problem(f"{i}", ({"role": "user", "content": f"say {'ab'[i % 2]}"},)) for i in range(3)]


@pytest.fixture
def roll_out(tiny_qwen3_folder, tiny_teacher_folder, tmp_path):
    def run(output, *, engine=None, task=None, student=tiny_qwen3_folder, **options):
        module = options.pop("module", None) or make_module(student, tiny_teacher_folder)
        engine = engine or FailingEngine()
        data = make_data(task=task or LetterTask(), engine=engine, validation_batch_size=5)
        trainer = RolloutTrainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **options.pop("trainer", {}),
        )
        trainer.rollout(module, data, str(tmp_path / output), **({"reject": LOOSE} | options))
        return [row for _, row in read_answers(tmp_path / output)]

    return run


def test_the_teacher_answers_by_default(roll_out, tmp_path, tiny_teacher_folder, tiny_qwen3_folder):
    rows = roll_out("a.jsonl")
    assert [row["uid"] for row in rows] == [f"train/{i}" for i in range(12)]
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher_folder).eval()
    for row in rows[:3]:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        logits = teacher(ids).logits[0, len(row["prompt_ids"]) - 1 : -1, :VOCAB_SIZE]
        log_probs = logits.log_softmax(-1).gather(-1, ids[0, len(row["prompt_ids"]) :, None])[:, 0]
        assert log_probs.tolist() == pytest.approx(row["log_probs"], abs=1e-4)
        assert row["reward"] in (0.0, 1.0) and row["num_tokens"] == len(row["response_ids"])
    header = read_header(tmp_path / "a.jsonl")
    assert header["settings"]["role"] == "teacher"
    assert header["settings"]["model"]["init_args"]["path"] == str(tiny_teacher_folder)
    assert header["counts"]["kept"] == header["counts"]["generated"] == 12
    assert header["has_log_probs"] and header["versions"]["torch"] == torch.__version__


def test_the_student_answers_with_another_file_ending_the_same(roll_out):
    options = {"role": "student", "split": "validation", "num_samples": 2, "num_problems": 4}
    rows = roll_out("a.jsonl", **options)
    assert [(row["uid"], row["sample"]) for row in rows] == [(f"validation/{i}", j) for i in range(4) for j in (0, 1)]
    assert [_rounded(row) for row in roll_out("a.parquet", **options)] == [_rounded(row) for row in rows]
    assert rows != roll_out("b.jsonl", **(options | {"role": "teacher"}))


def test_the_teacher_s_scores_are_written_beside_the_answers_and_read_back(
    roll_out, tmp_path, tiny_qwen3_folder, tiny_teacher_folder
):
    options = {"role": "student", "score": True, "score_top_k": 2, "num_problems": 3}
    rows = roll_out("a.parquet", **options)
    student, stored = HFStudent(str(tiny_qwen3_folder)), StoredTeacher(str(tmp_path / "a.parquet"))
    teacher = HFTeacher(str(tiny_teacher_folder), dtype="float32")
    source = Stored(stored.path)
    problems = source.admit(LetterTask().problems("train")[:3], student.tokenizer, Sampling(8), 1)
    prompts = [Prompt(problem, tuple(student.tokenizer.render(problem.messages)), (0,)) for problem in problems]
    live = SimpleNamespace(spec=student, weight_version=0)
    batch = collate(source.rollouts(StepPrompts(0, (0, 1, 2), tuple(prompts)), Sampling(8), live).rollouts, 0)
    for each in (stored, teacher):
        each.setup(student, torch.nn.Module(), torch.device("cpu"))
    told, expected = (each.score(batch, stored.offer) for each in (stored, teacher))
    torch.testing.assert_close(told.sampled(), expected.sampled())
    torch.testing.assert_close(told.topk(2), expected.topk(2))
    assert told.sampled().tolist() == [value for row in rows for value in row["teacher_log_probs"]]
    with pytest.raises(ValueError, match=r"begun with other settings: scores.top_k was 2, now it is 1"):
        roll_out("a.parquet", **(options | {"score_top_k": 1}))


@pytest.mark.parametrize("ending", ["jsonl", pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_and_nothing_is_generated_twice(roll_out, tmp_path, ending):
    options = {"num_samples": 2, "reject": Rejection(truncated=False, pattern="[aeiou]"), "num_attempts": 4}
    whole = FailingEngine()
    roll_out(f"whole.{ending}", engine=whole, **options)
    assert len(whole.asked) > 24  # some were asked again
    asked = []
    for calls in (0, 3, 2, 10**6):
        engine = FailingEngine(calls)
        if calls < 10**6:
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                roll_out(f"cut.{ending}", engine=engine, **options)
        else:
            roll_out(f"cut.{ending}", engine=engine, **options)
        asked += engine.asked
    assert (tmp_path / f"cut.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    assert read_header(tmp_path / f"cut.{ending}") == read_header(tmp_path / f"whole.{ending}")
    assert asked[-1] == whole.asked[-1]
    again = FailingEngine(0)
    roll_out(f"cut.{ending}", engine=again, **options)  # complete: nothing is asked, nothing loaded


def test_rejected_answers_are_asked_for_again_and_counted(roll_out, tmp_path, capsys):
    engine = FailingEngine()
    rules = Rejection(truncated=False, wrong=True)
    rows = roll_out("a.jsonl", engine=engine, reject=rules, num_samples=2, num_attempts=3)
    assert all(row["reward"] == 1 for row in rows)
    assert {row["attempt"] for row in rows} > {0}
    counts = read_header(tmp_path / "a.jsonl")["counts"]
    assert counts["generated"] == len(engine.asked) == counts["kept"] + counts["rejected: wrong"]
    assert len(set(engine.asked)) == len(engine.asked)  # another seed each time
    answered = {row["uid"] for row in rows}
    assert counts["problems without an answer"] == 12 - len(answered)
    printed = capsys.readouterr().out
    assert (
        f"Generated {counts['generated']}, kept {counts['kept']}, rejected: {counts['rejected: wrong']} wrong."
        in printed
    )


def test_the_same_answers_are_kept_once_and_the_same_prompts_asked_once(roll_out, tmp_path, capsys):
    rows = roll_out("a.jsonl", task=Ungraded(), num_samples=6, num_attempts=2, sampling=Sampling(1))
    for uid in ("0", "1"):
        found = [tuple(row["response_ids"]) for row in rows if row["uid"] == uid]
        assert len(found) == len(set(found)) > 0
    assert {row["uid"] for row in rows} == {"0", "1"}
    assert all(row["reward"] is None for row in rows)
    assert "1 problems were not asked: their prompts repeat earlier ones." in capsys.readouterr().out


def test_a_checkpoint_of_the_student_answers(roll_out, tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    from toys import make_trainer

    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(module, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    options = {"role": "student", "num_problems": 4}
    plain = roll_out("plain.jsonl", **options)
    trained = roll_out("trained.jsonl", ckpt_path=str(tmp_path / "a.ckpt"), **options)
    assert [row["seed"] for row in plain] == [row["seed"] for row in trained]
    assert [row["log_probs"] for row in plain] != [row["log_probs"] for row in trained]


def test_mistakes_are_answered_in_one_line(roll_out, tmp_path, tiny_qwen3_folder):
    from opd_lightning.teachers import BaseModelTeacher
    from opd_lightning.training.module import OPDModule

    class Empty(Task):
        def problems(self, split):
            return []

    def fails(message, output="a.jsonl", **options):
        with pytest.raises(ValueError, match=message) as caught:
            roll_out(output, **options)
        assert "\n" not in str(caught.value)

    student = HFStudent(str(tiny_qwen3_folder))
    alone = OPDModule(student, None)
    fails(r"output: expected a file ending in \.jsonl or \.parquet", output="a.csv")
    fails("output: '.*plain' cannot be a folder|cannot be a folder", output=_file(tmp_path) + "/a.jsonl")
    fails("output: expected a file to write", output=_folder(tmp_path, "b.jsonl"))
    fails("Empty has no problems in its 'train' split", task=Empty())
    fails("model.teacher: there is none to answer", module=alone)
    fails("BaseModelTeacher only scores", module=OPDModule(student, BaseModelTeacher()))
    fails("at temperature 0 all answers", sampling=Sampling(4, temperature=0), num_samples=2)
    fails("ckpt_path: a checkpoint holds the student's", ckpt_path="x.ckpt")
    fails("Ungraded has no answers to mark", task=Ungraded(), reject=Rejection(wrong=True))
    fails("rollout.score_top_k=3: without scores there are no lists", score_top_k=3)
    fails("model.teacher: there is none to score the answers", module=alone, role="student", score=True)
    fails("rollout.score_top_k: expected an integer of at least 0", score=True, score_top_k=-1)
    fails("rollout.num_samples: expected an integer of at least 1", num_samples=0)
    for options in ({"limit_predict_batches": 1}, {"limit_predict_batches": 0.5}, {"fast_dev_run": True}):
        fails(
            "trainer.limit_predict_batches.* would count as complete without.* --num_problems",
            trainer=options,
        )
    roll_out("a.jsonl", num_problems=2)
    fails("begun with other settings: num_samples was 1, now it is 2", num_problems=2, num_samples=2)


def _rounded(row):
    """Log-probabilities are float32 in the one and their shortest decimals in the other."""
    return row | {"log_probs": torch.tensor(row["log_probs"]).tolist()}


def _file(folder):
    (folder / "plain").write_text("")
    return "plain"


def _folder(folder, name):
    (folder / name).mkdir()
    return name


@pytest.mark.slow
def test_the_command_killed_by_the_system_and_given_again(forks, tmp_path):
    """SIGKILL leaves no time for anything."""
    words = ["rollout", "--config", "@quickstart", "--num_problems", "96", "--data.validation_batch_size", "16"]
    words += ["--data.task.num_train", "96"]
    process = forks.start("opd-lightning", *words, "--output", "cut.jsonl", cwd=tmp_path)
    progress = tmp_path / "cut.jsonl.progress"
    while not progress.exists() or progress.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut.jsonl").exists()
    result = forks.run("opd-lightning", *words, "--output", "cut.jsonl", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "goes on after" in result.stdout
    header = json.loads((tmp_path / "cut.jsonl.header.json").read_text())
    assert header["command"].endswith("--output cut.jsonl")
    main([*words, "--output", str(tmp_path / "whole.jsonl"), "--trainer.default_root_dir", str(tmp_path)])
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_command_says_what_is_wrong(capsys, tmp_path):
    base = ["rollout", "--config", str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")]
    with pytest.raises(SystemExit) as stop:
        main([*base, "--output", str(tmp_path / "a.jsonl"), "--reject.pattern", "(("])
    assert stop.value.code == 2
    assert "expected a regular expression, got '(('" in capsys.readouterr().err


@pytest.mark.slow
def test_the_commands_of_the_cold_start_page(tmp_path, monkeypatch):
    """As they are written there, with fewer prompts and steps."""
    page = (Path(__file__).parents[2] / "docs" / "cold_start.md").read_text()
    script = page.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    commands = [shlex.split(line, comments=True)[1:] for line in script.splitlines() if not line.startswith("#")]
    assert [command[0] for command in commands] == ["rollout", "fit", "export", "fit"]
    few = ["--data.prompts_per_step", "8", "--data.num_validation_problems", "4", "--trainer.val_check_interval", "2"]
    steps = ["--trainer.max_steps", "2", "--trainer.callbacks.every_n_train_steps", "2"]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        extra = {"rollout": ["--num_problems", "16"], "fit": [*few, *steps], "export": []}[command[0]]
        main([*command, *extra])
    metrics = next(tmp_path.glob("runs/after_cold_start/lightning_logs/*/metrics.csv")).read_text()
    assert "train/reverse_kl" in metrics
