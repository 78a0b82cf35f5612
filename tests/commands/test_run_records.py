"""A run's settings lie in its own folder and in its loggers, whoever logs."""

import pytest
import yaml
from lightning.pytorch.loggers.logger import Logger
from test_ckpt_path import elsewhere, run  # noqa: F401

from opd_lightning.commands.cli import main
from opd_lightning.commands.run_records import flat


class OneFolderLogger(Logger):
    """Shaped like W&B's: a folder for all runs, the current one by default, and a name for each."""

    settings: dict = {}

    def __init__(self, save_dir: str = "."):
        self._save_dir = save_dir

    save_dir = property(lambda self: self._save_dir)
    name, version = "project", "k3x9"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        self.settings.update(params)


class RemoteLogger(OneFolderLogger):
    """Shaped like MLflow's with a server: no folder at all."""

    save_dir = property(lambda self: None)


def records(tmp_path, logger):
    run(tmp_path / "runs", "--trainer.max_steps", "1", "--trainer.logger", f"{__name__}.{logger.__name__}")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("runs", "run.yaml")]
    return {str(path.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").rglob("*") if path.is_file()}


def test_a_logger_writes_below_default_root_dir_and_gets_the_settings(tmp_path):
    expected = {"project/k3x9/config.yaml", "project/k3x9/checkpoints/last.ckpt"}
    assert expected <= records(tmp_path, OneFolderLogger)
    assert OneFolderLogger.settings["model.student.init_args.path"] == "sandbox:student"
    assert OneFolderLogger.settings["data.engine.class_path"].endswith("HFEngine")  # defaults too
    assert OneFolderLogger.settings["trainer.callbacks.0.init_args.save_last"] is True


def test_a_logger_without_a_folder_leaves_the_records_in_default_root_dir(tmp_path):
    assert "project/k3x9/config.yaml" in records(tmp_path, RemoteLogger)


def test_a_folder_that_was_named_stays(tmp_path):
    words = ["--trainer.logger", f"{__name__}.OneFolderLogger", "--trainer.logger.save_dir", str(tmp_path / "mine")]
    run(tmp_path / "runs", "--trainer.max_steps", "1", *words)
    assert (tmp_path / "mine" / "project" / "k3x9" / "config.yaml").exists()


def test_the_file_loggers_get_the_settings_beside_their_metrics(tmp_path):
    run(tmp_path / "runs", "--trainer.max_steps", "1")
    folder = tmp_path / "runs" / "lightning_logs" / "version_0"
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["data.prompts_per_step"] == 2
    assert {"config.yaml", "metrics.csv", "hparams.yaml"} <= {path.name for path in folder.iterdir()}


def test_settings_by_their_dotted_names():
    settings = {"a": {"b": [1, 2], "c": {}}, "d": [{"e": None}, {"f": "x"}]}
    assert flat(settings) == {"a.b": [1, 2], "a.c": {}, "d.0.e": None, "d.1.f": "x"}


SERVERS = "opd_lightning.backends.vllm.server"
TEACHER = "model.teacher.init_args.connection"


def test_no_record_of_a_run_holds_a_secret_and_a_run_of_it_asks_for_them(tmp_path, capfd):
    words = ["--model.teacher", f"{SERVERS}.VLLMServerTeacher", "--model.teacher.connection.patience=0.1"]
    words += ["--model.teacher.connection.urls=[http://me:hush@127.0.0.1:9]", "--model.teacher.connection.api_key=hush"]
    with pytest.raises(SystemExit):  # nobody answers there
        run(tmp_path / "runs", "--trainer.max_steps", "1", *words)
    (config,) = (tmp_path / "runs").rglob("config.yaml")
    for path in (path for path in (tmp_path / "runs").rglob("*") if path.is_file()):
        assert b"hush" not in path.read_bytes(), path
    kept = yaml.safe_load(config.read_text())["model"]["teacher"]["init_args"]["connection"]
    assert kept["urls"] == [f"http://<left out, set {TEACHER}.urls again>@127.0.0.1:9"]
    assert "hush" not in "".join(capfd.readouterr())
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config)])
    assert stopped.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert f"{TEACHER}.urls: its password or key was left out when this configuration was saved" in line
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--model.teacher.connection.urls=[http://me:hush@127.0.0.1:9]"])
    assert f"{TEACHER}.api_key: its password or key was left out" in capfd.readouterr().err
