"""A checkpoint from elsewhere is read like one from here: checked, and nothing that it brings is run."""

import functools
import http.server
import threading
from pathlib import Path

import pytest
import torch
from test_ckpt_path import run

from opd_lightning.commands.cli import main
from opd_lightning.training.checkpoints import read_checkpoint

COMMANDS = ("fit", "validate", "test", "predict")


class Foreign:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["opd-lightning"])


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with a good checkpoint, and where it is served."""
    folder = tmp_path_factory.mktemp("served")
    run(folder / "runs", "--trainer.max_steps", "1", dirpath=str(folder), filename="good", save_last=False)
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def refusal(capfd, *words, command):
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(Path("runs").absolute(), *words, "--trainer.max_steps", "2", command=command)
    shown = capfd.readouterr().err
    assert "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("opd-lightning: error: ")]
    return stopped.value.code, line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_nothing_is_run_from_anywhere(scheme, command, served, capfd, tmp_path):
    folder, address = served
    made = tmp_path / "made"
    name = f"{scheme}-{command}.ckpt"  # whatever is kept of an address must not be what passes here
    torch.save(torch.load(folder / "good.ckpt", weights_only=True) | {"evil": Foreign(made)}, folder / name)
    path = f"file://{folder}/{name}" if scheme == "file" else f"{address}/{name}"
    status, line = refusal(capfd, "--ckpt_path", path, command=command)
    assert status == 2
    assert f"{name}' holds more than tensors and plain values" in line
    assert not made.exists()


def test_a_checkpoint_from_elsewhere_is_resumed_validated_and_exported(served, tmp_path, capfd):
    _, address = served
    saver = {"dirpath": str(tmp_path / "saved"), "filename": "{step}"}
    run(tmp_path / "runs", "--ckpt_path", f"{address}/good.ckpt", "--trainer.max_steps", "2", **saver)
    assert read_checkpoint(tmp_path / "saved" / "step=2.ckpt")["global_step"] == 2
    words = ["--ckpt_path", f"{address}/good.ckpt", "--trainer.limit_val_batches", "1"]
    run(tmp_path / "runs", *words, command="validate")
    main(["export", "--ckpt_path", f"{address}/good.ckpt", "--output", str(tmp_path / "model")])
    assert (tmp_path / "model" / "model.safetensors").exists()
    capfd.readouterr()


def test_a_damaged_checkpoint_from_elsewhere_is_refused(served, capfd):
    folder, address = served
    content = bytearray((folder / "good.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "flipped.ckpt").write_bytes(content)
    status, line = refusal(capfd, "--ckpt_path", f"{address}/flipped.ckpt", command="validate")
    assert status == 2
    assert "flipped.ckpt'" in line and "damaged" in line and "Fetch it again" in line


@pytest.mark.parametrize(
    ("path", "expected", "status"),
    [
        ("{address}/absent.ckpt", "ckpt_path: there is no '", 2),
        ("http://127.0.0.1:1/x.ckpt", "ckpt_path: 'http://127.0.0.1:1/x.ckpt' cannot be fetched into", 1),
        ("nowhere://x.ckpt", "ckpt_path: 'nowhere://x.ckpt' cannot be read: Protocol not known", 2),
        ("file:///absent/x.ckpt", "ckpt_path: no file '/absent/x.ckpt'", 2),
    ],
)
def test_what_cannot_be_fetched_is_said_in_one_line(path, expected, status, served, capfd):
    said = refusal(capfd, "--ckpt_path", path.format(address=served[1]), command="validate")
    assert said[0] == status
    assert expected in said[1]


def test_foreign_objects_cannot_be_asked_for(served, capfd):
    words = ["--ckpt_path", str(served[0] / "good.ckpt"), "--weights_only", "false"]
    status, line = refusal(capfd, *words, command="fit")
    assert status == 2
    assert "weights_only: false would run what a checkpoint says" in line


@pytest.mark.slow
def test_the_password_of_an_address_is_used_and_never_shown(served, tmp_path, capfd, caplog):
    address = served[1].replace("http://", "http://me:hush@")
    run(tmp_path / "runs", "--trainer.max_steps", "2", "--ckpt_path", f"{address}/good.ckpt")
    assert f"{served[1]}/good.ckpt" in caplog.text
    _, line = refusal(capfd, "--ckpt_path", f"{address}/absent.ckpt?sig=hush", command="fit")
    assert f"there is no '{served[1]}/absent.ckpt'" in line
    assert "hush" not in caplog.text + "".join(capfd.readouterr()) + line
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hush" in path.read_bytes()]
