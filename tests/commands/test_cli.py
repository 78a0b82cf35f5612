import subprocess
import sys

import pytest

from opd_lightning.commands.cli import main

TASK = """
from opd_lightning.interfaces import Problem, Task


class Capitals(Task):
    def problems(self, split):
        question = {"role": "user", "content": "1+1="}
        return [Problem(uid=f"{split}/0", messages=(question,), answer="2")]

    def grade(self, problem, response):
        return float(problem.answer in response)
"""


def test_a_task_in_the_users_folder_is_found(tmp_path):
    (tmp_path / "my_tasks.py").write_text(TASK)
    program = (
        "import sys; sys.path.remove('') if '' in sys.path else None; from opd_lightning.commands.cli import main;"
        "main(['validate', '--model.student', 'HFStudent', '--model.student.path', 'sandbox:student',"
        "'--data.task', 'my_tasks.Capitals', '--data.sampling.max_new_tokens', '8', '--trainer.accelerator', 'cpu',"
        "'--trainer.logger', 'false'])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "val/avg_at_1" in result.stdout


def test_a_second_file_goes_on_top_of_the_first(tmp_path, capsys):
    (tmp_path / "first.yaml").write_text("trainer: {max_steps: 5, accelerator: cpu}\ndata: {prompts_per_step: 2}\n")
    (tmp_path / "second.yaml").write_text("trainer: {max_steps: 7}\n")
    files = ["--config", str(tmp_path / "first.yaml"), "--config", str(tmp_path / "second.yaml")]
    parts = ["--model.student", "HFStudent", "--model.student.path", "sandbox:student", "--data.task", "ArithmeticTask"]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *files, *parts, "--print_config"])
    shown = capsys.readouterr().out
    assert "max_steps: 7" in shown
    assert "prompts_per_step: 2" in shown
