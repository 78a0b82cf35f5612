import gc
import json
import subprocess
import sys
from importlib import import_module

import pytest
import yaml

from opd_lightning import __version__
from opd_lightning.backends.hf import HFStudent
from opd_lightning.commands import shipped_configs
from opd_lightning.commands.cli import DEFAULT_CLASSES, OPDCLI, main
from opd_lightning.commands.parser import class_at
from opd_lightning.tasks import ArithmeticTask
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule

TASK = """
from opd_lightning.interfaces import Problem, Task


class Capitals(Task):
    def problems(self, split):
        question = {"role": "user", "content": "1+1="}
        return [Problem(uid=f"{split}/0", messages=(question,), answer="2")]

    def grade(self, problem, response):
        return float(problem.answer in response)
"""


@pytest.mark.slow
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


def test_what_was_imported_is_not_searched_for_garbage(monkeypatch):
    monkeypatch.delitem(sys.modules, "opd_lightning.__main__", raising=False)
    gc.unfreeze()
    import_module("opd_lightning.__main__")
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000


MODULES = {
    "AnswersWriter": "answers",
    "HeldOutMarks": "held_out_marks",
    "RescueCheckpoint": "rescue",
    "StartValidation": "start_validation",
}
MINIMAL = ["--model.student", "HFStudent", "--model.student.path", "sandbox:student", "--data.task", "ArithmeticTask"]


@pytest.mark.slow
def test_the_working_folder_shadows_no_installed_package(tmp_path):
    """Under the console script, whose own folder is first on the path, and as a module, where the folder is."""
    for name in ("pyarrow", "torch", "lightning"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "my_own.py").write_text("raise SystemExit('found')")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "script.py").write_text("from opd_lightning.commands.cli import main; main()")
    for command in ([str(tmp_path / "bin" / "script.py")], ["-m", "opd_lightning"]):
        words = [sys.executable, *command, "fit", *MINIMAL, "--model.teacher", "my_own.Teacher"]
        result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert result.stderr.splitlines()[-1] == "found"  # after all installed ones


def test_the_defaults_are_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *MINIMAL, "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    for name, class_path in DEFAULT_CLASSES.items():
        room, key = name.split(".")
        assert class_at(shown[room][key]["class_path"]) is class_at(class_path)
    assert shown["model"]["objective"]["init_args"]["chunk_tokens"] > 0


def test_the_table_of_defaults_says_what_the_constructors_take():
    module, data = OPDModule(HFStudent("sandbox:student")), OPDDataModule(ArithmeticTask())
    built = {"model.objective": module.objective, "data.engine": data.engine, "data.selector": data.selector}
    built["data.source"] = data.source
    assert {name: class_at(path) for name, path in DEFAULT_CLASSES.items()} == {k: type(v) for k, v in built.items()}


def test_another_class_takes_none_of_the_defaults_arguments(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "fit",
                *MINIMAL,
                "--data.selector",
                "DifficultyPool",
                "--data.engine.max_batch_size",
                "3",
                "--print_config",
            ]
        )
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["selector"]["class_path"].endswith("DifficultyPool")
    assert data["engine"]["init_args"] == {"max_batch_size": 3, "static_shapes": False}


def test_engines_teachers_and_alarms_of_vllm_have_short_names_too(capsys):
    server = ["--data.engine", "VLLMServerEngine", "--data.engine.connection.urls", "[http://127.0.0.1:1]"]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *MINIMAL, *server, "--trainer.callbacks", "MismatchAlarm", "--print_config"])
    with pytest.raises(SystemExit, match="0"):
        main(
            ["fit", *MINIMAL, "--data.engine", "VLLMColocatedEngine", "--data.engine.devices", "[1]", "--print_config"]
        )
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("VLLMServerEngine", "MismatchAlarm", "VLLMColocatedEngine"))


@pytest.mark.parametrize("name", list(MODULES))
def test_a_callback_of_the_users_takes_the_place_of_ours(name, monkeypatch):
    found = []
    monkeypatch.setattr(OPDCLI, "_run_subcommand", lambda self, command: found.extend(self.trainer.callbacks))
    own = {"class_path": f"opd_lightning.callbacks.{MODULES[name]}.{name}"}
    main(["fit", *MINIMAL, "--trainer.callbacks", json.dumps([own]), "--trainer.logger", "false"])
    assert [type(callback).__name__ for callback in found].count(name) == 1


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"opd-lightning {__version__}\n"


def test_the_shipped_configurations_are_listed_and_printed(capsys):
    main(["configs"])
    assert "@quickstart\n    watch a student learn" in capsys.readouterr().out
    main(["configs", "quickstart"])
    assert capsys.readouterr().out == shipped_configs.path_of("quickstart").read_text()


def test_completion_in_a_real_shell(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print_completion"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    typed = ["opd-lightning f", "opd-lightning fit --data.prompts", "opd-lightning fit --config @quick"]
    typed += ["opd-lightning export --dt", "opd-lightning configs quick"]
    found = []
    for line in typed:
        complete = (
            f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _opd_lightning; echo ${{COMPREPLY[@]}}"
        )
        command = ["bash", "-c", f"source {tmp_path / 'script'}; {complete}"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    both = "quickstart quickstart_effopd"
    assert found == ["fit", "--data.prompts_per_step", "@quickstart @quickstart_effopd", "--dtype", both]


@pytest.mark.slow
def test_neither_advertisements_nor_deprecations_of_others_are_shown(tmp_path):
    settings = ["--data.task.num_train", "4", "--data.task.num_validation", "2", "--data.sampling.max_new_tokens", "4"]
    words = ["--trainer.max_steps", "1", "--data.prompts_per_step", "2", "--trainer.default_root_dir", str(tmp_path)]
    command = [sys.executable, "-m", "opd_lightning", "fit", "--config", "@quickstart", *words, *settings]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for noise in ("Tip:", "litlogger", "FutureWarning", "FLOPs", "TPU available"):
        assert noise not in result.stdout + result.stderr
    assert "Student: Qwen3ForCausalLM, 625 k parameters (625 k trained), 2.5 MB" in result.stderr
