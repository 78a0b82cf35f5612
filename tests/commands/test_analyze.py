"""`opd-lightning analyze` by value, from a run to its numbers on the disk."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_ckpt_path import SAVER, SETTINGS, elsewhere  # noqa: F401

from opd_lightning.backends.hf import HFStudent
from opd_lightning.commands.analyze import analyze
from opd_lightning.commands.cli import main
from opd_lightning.commands.norm_scaling import WeightsOfVariant, recovered, variants
from opd_lightning.commands.update_geometry import measure
from opd_lightning.training.run_points import find_updates

RECORDER = "opd_lightning.callbacks.update_recorder.UpdateRecorder"


def make_run(folder, updates):
    """Exported folders, each with the start and one of these changes: {step: {name: tensor}}."""
    shapes = next(iter(updates.values()))
    start = {name: torch.full(change.shape, 0.5) for name, change in shapes.items()}
    for step, changes in {0: {}, **updates}.items():
        (folder / f"step={step}").mkdir(parents=True)
        weights = {name: weight + changes.get(name, 0.0) for name, weight in start.items()}
        save_file(weights, folder / f"step={step}" / "model.safetensors")
        (folder / f"step={step}" / "config.json").write_text("{}")
    return folder


def grid(seed, rows, columns):
    """Whole multiples of 1/1024, so that adding them to 0.5 rounds nothing."""
    return torch.randint(-300, 300, (rows, columns), generator=torch.Generator().manual_seed(seed)) / 1024


def test_every_number_of_a_run_that_is_known(tmp_path):
    up, query = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    last = {up: grid(0, 6, 4), query: grid(1, 3, 5), embedding: grid(2, 9, 4), norm: torch.ones(4)}
    early = {up: last[up] / 2, query: torch.zeros(3, 5), embedding: grid(3, 9, 4), norm: torch.zeros(4)}
    found = measure(find_updates(str(make_run(tmp_path, {2: early, 8: last}))))
    assert found.steps == [2, 8] and [each.name for each in found.matrices] == [up, query, embedding]
    assert [each.kind for each in found.matrices] == ["mlp", "attention", "embedding"]
    assert [each.layer for each in found.matrices] == [0, 1, None]
    sizes = [float(last[name].norm()) for name in (up, query)]
    at_end = found.mean_spectrum(1)
    assert at_end["frobenius"] == pytest.approx(math.hypot(*sizes))
    values = [torch.linalg.svdvals(last[name].double()) for name in (up, query)]
    assert at_end["spectral_share"] == pytest.approx(sum(float(s[0] / s.norm()) for s in values) / 2)
    ranks = [float(torch.special.entr(s / s.sum()).sum().exp()) for s in values]
    assert at_end["effective_rank"] == pytest.approx(sum(ranks) / 2)
    assert found.mean_spectrum(1, ("mlp",))["effective_rank"] == pytest.approx(ranks[0])
    assert found.mean_spectrum(1, layer=1)["effective_rank"] == pytest.approx(ranks[1])
    assert found.mean_spectrum(0)["effective_rank"] == pytest.approx(ranks[0])  # the other has not moved
    mlp, attention, embeddings = found.matrices
    assert mlp.cosine_to_last == pytest.approx([1, 1]) and mlp.subspace_cosines[0] == pytest.approx([1] * 4)
    assert math.isnan(attention.cosine_to_last[0]) and attention.subspace_cosines[0] == []
    assert attention.unchanged[0] == 1 and embeddings.spectra == [] and not embeddings.subspace_cosines
    a, b = (torch.cat([w[up].flatten(), w[query].flatten()]).double() for w in (early, last))
    assert found.cosine_to_last[0] == pytest.approx(float(a @ b / a.norm() / b.norm()))
    points = torch.stack([torch.zeros_like(a), a, b])
    variance = torch.linalg.svdvals(points - points.mean(0)).square()
    assert found.variance == pytest.approx((variance / variance.sum()).tolist(), abs=1e-9)
    assert found.random_walk_cosine == pytest.approx([0.5, 1])
    with pytest.raises(ValueError, match="expected some that are no embeddings"):
        measure(find_updates(str(tmp_path), pattern="embed"))


@pytest.fixture
def tiny(tmp_path, tiny_qwen3_folder):
    """A run of a tiny model in exported folders, its weights at the start, and their updates at steps 1 and 4."""
    start = load_file(tiny_qwen3_folder / "model.safetensors")
    changes = {step: {} for step in (1, 4)}
    for number, (name, weight) in enumerate(start.items()):
        for step, by_name in changes.items():
            by_name[name] = step * torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(97 * step + number)
            )
    for step, by_name in changes.items():
        folder = tmp_path / "run" / f"step={step}"
        folder.mkdir(parents=True)
        save_file({name: weight + by_name[name] for name, weight in start.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    return tmp_path / "run", start, changes


def test_a_variant_is_what_it_says(tiny, tiny_qwen3_folder):
    run, start, changes = tiny
    updates = find_updates(str(run), start=str(tiny_qwen3_folder))
    model = HFStudent(str(tiny_qwen3_folder)).load()
    writer = WeightsOfVariant(updates)

    def moved(variant):
        writer.write(variant, model)
        return {name: weight.detach() - start[name] for name, weight in model.named_parameters()}

    listed = {each.label: each for each in variants(updates, 0, [0.5])}
    assert all(not change.any() for change in moved(listed["start"]).values())
    for label, sizes in (
        ("end", {}),
        ("step 1 as it was", {}),
        ("step 1, scale 0.5", {"_proj": 0.5}),
        ("step 1, scale 1, embeddings and norms too", {"": 1.0}),
        ("end, embeddings of the start", {"embed": 0.0, "lm_head": 0.0}),
    ):
        known = changes[4 if "end" in label else 1]
        for name, change in moved(listed.pop(label)).items():
            size = next((size for part, size in sizes.items() if part in name), None)
            factor = 1.0 if size is None else size * float(changes[4][name].norm() / known[name].norm())
            torch.testing.assert_close(change, factor * known[name], rtol=1e-4, atol=1e-4)
    assert list(listed) == ["start"]


def test_the_command_writes_tables_json_and_a_page(tiny, tiny_qwen3_folder, tmp_path, capsys):
    main(["analyze", "--run", str(tiny[0]), "--start", str(tiny_qwen3_folder), "--output", str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert "Spectra" in shown.out and "When directions settle" in shown.out and str(tmp_path / "out") in shown.out
    assert "Every matrix" not in shown.out and "2 points: their first two components" in shown.out
    numbers = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert numbers["geometry"]["steps"] == [1, 4] and len(numbers["geometry"]["matrices"]) == 2 * 7 + 2
    exact = measure(find_updates(str(tiny[0]), start=str(tiny_qwen3_folder)))
    assert numbers["means"]["attention_and_mlp"][1] == exact.mean_spectrum(1)
    assert numbers["variants"] == numbers["recovery"] == []
    page = (tmp_path / "out" / "analysis.html").read_text()
    assert "Every matrix" in page and "model.layers.1.mlp.down_proj.weight" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"run": "nowhere"}, "run: there is no folder 'nowhere'"),
        ({"start": "/nowhere/model"}, "start: the weights are not at '/nowhere/model'"),
        ({"early": "1.5"}, "early: expected a share of training between 0 and 1, got 1.5"),
        ({"scales": "[-1.0]"}, "scales: expected sizes from 0 on"),
        ({"num_problems": "0"}, "num_problems: expected at least 1 or null, got 0"),
        ({"device": "abacus"}, "device: expected a device of this machine that knows float64"),
        ({"config": "nowhere.yaml"}, "config: there is no file 'nowhere.yaml'"),
        ({"output": "a_file/out"}, "output: 'a_file/out' cannot be a folder, since"),
        ({"points_from": "dreams"}, "points_from"),
    ],
)
def test_mistakes_are_one_line(words, message, tiny, tiny_qwen3_folder, tmp_path, capfd):
    (tmp_path / "a_file").write_text("")
    options = {"run": str(tiny[0]), "start": str(tiny_qwen3_folder)} | words
    with pytest.raises(SystemExit, match="2"):
        main(["analyze", *(f"--{name}={value}" for name, value in options.items())])
    lines = [line for line in capfd.readouterr().err.splitlines() if "OPD_LIGHTNING_TRACEBACK" not in line]
    assert len(lines) == 1 and message in lines[0]


def test_a_diverged_run_is_named(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    make_run(tmp_path, {1: {name: grid(0, 3, 3)}, 2: {name: torch.full((3, 3), math.nan)}})
    with pytest.raises(ValueError, match=r"up_proj.weight holds NaN or infinity in '.*step=2'"):
        measure(find_updates(str(tmp_path)))


def test_the_recovered_share():
    assert recovered(0.7, 0.5, 0.9) == pytest.approx(0.5) and recovered(0.2, 0.4, 0.1) == pytest.approx(2 / 3)
    assert recovered(None, 0, 1) is None and recovered(1.0, 0.5, 0.5) is None


@pytest.mark.slow
def test_a_run_of_the_command_line_is_answered_again_with_other_weights(tmp_path, capsys):
    saver = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}", "save_weights_only": True}
    callbacks = [{"class_path": RECORDER}, {"class_path": SAVER, "init_args": saver}]
    trainer = SETTINGS["trainer"] | {"default_root_dir": str(tmp_path), "max_steps": 2, "callbacks": callbacks}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SETTINGS | {"trainer": trainer}))
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    run = tmp_path / "lightning_logs" / "version_0"
    words = ["--config", str(run / "config.yaml"), "--num_problems", "4", "--scales", "[1.0]", "--matrices", "layers.0"]
    main(["analyze", "--run", str(run), "--points_from", "checkpoints", *words])
    numbers = json.loads((run / "analysis" / "analysis.json").read_text())
    tried = {each["label"]: each for each in numbers["variants"]}
    assert list(tried)[:2] == ["start", "end"] and all(each["num_answers"] == 4 for each in tried.values())
    assert 0 < tried["start"]["reverse_kl"] != tried["end"]["reverse_kl"]
    assert [each["reverse_kl"] for each in numbers["recovery"][:2]] == [0, 1]
    assert "Early direction, late size" in capsys.readouterr().out
    with pytest.raises(ValueError, match="config: records of UpdateRecorder hold some weights only"):
        analyze(str(run), run_config=str(run / "config.yaml"), points_from="records", output=str(tmp_path / "out"))
