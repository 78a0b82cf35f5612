import hashlib
import random
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning import sandbox
from opd_lightning.backends.hf.loading import ModelSource
from opd_lightning.sandbox import make
from opd_lightning.sandbox.make import draw_batches, measure_accuracy, misjudge, write_solution
from opd_lightning.tasks.arithmetic import ArithmeticTask, solve

PATHS = {"student": sandbox.student_path(), "teacher": sandbox.teacher_path()}
PROMPT = [{"role": "user", "content": "17+25-8="}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(sandbox.student_path())


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in PATHS.items()}


def test_names_stand_for_folders_and_other_paths_pass_through():
    assert sandbox.resolve("sandbox:student") == str(sandbox.student_path())
    assert sandbox.resolve("sandbox:teacher") == str(sandbox.teacher_path())
    for path in ("Qwen/Qwen3-1.7B", "/models/sandbox:student", "./sandbox", ""):
        assert sandbox.resolve(path) == path


@pytest.mark.parametrize("path", ["sandbox:", "sandbox:Student", "sandbox:student/..", "sandbox:judge"])
def test_unknown_sandbox_models_are_refused(path):
    with pytest.raises(
        ValueError, match=f"expected sandbox:student, .* or sandbox:long-teacher, got '{re.escape(path)}'"
    ):
        sandbox.resolve(path)
    with pytest.raises(ValueError, match=r"^teacher\.path: expected sandbox:student"):
        ModelSource(path, "teacher").check()


def test_finding_the_models_imports_nothing_heavy():
    code = "import opd_lightning.sandbox as s, sys; s.resolve('sandbox:student'); print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_shipped_files_are_few_and_small():
    for path in PATHS.values():
        assert {file.name for file in path.iterdir()} == {
            "README.md",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
    assert sum(file.stat().st_size for path in PATHS.values() for file in path.iterdir()) < 6_000_000


@pytest.mark.parametrize("name", PATHS)
def test_the_card_names_the_weights_beside_it(name):
    digest = hashlib.sha256((PATHS[name] / "model.safetensors").read_bytes()).hexdigest()
    card = (PATHS[name] / "README.md").read_text()
    assert digest in card
    assert "python -m opd_lightning.sandbox.make --seed 0" in card


def test_student_and_teacher_share_architecture_and_tokenizer(models):
    student, teacher = PATHS["student"], PATHS["teacher"]
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (student / file).read_bytes() == (teacher / file).read_bytes()
    assert models["student"].config.architectures == ["Qwen3ForCausalLM"]
    assert all(p.dtype == torch.float32 for p in models["teacher"].parameters())
    assert 500_000 <= models["student"].num_parameters() <= 1_500_000
    assert models["student"].lm_head.weight is models["student"].model.embed_tokens.weight


def test_special_tokens_are_where_a_trainer_looks(tokenizer, models):
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.eos_token_id == end_of_turn
    assert tokenizer.pad_token_id not in (None, end_of_turn, end_of_text)
    assert models["student"].generation_config.eos_token_id == [end_of_turn, end_of_text]
    assert len(tokenizer) == models["student"].config.vocab_size
    assert tokenizer.model_max_length == models["student"].config.max_position_embeddings


@pytest.mark.parametrize("text", ["17+25-8=", solve("17+25-8"), "put your answer in \\boxed{}\n", " Hé 漢\x00\t<b>"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_chat_template_gives_each_role_one_token(tokenizer):
    rendered = tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>17+25-8=<|im_end|><|assistant|>"
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert len(ids) == len("17+25-8=") + 3
    conversation = [{"role": "system", "content": "s"}, *PROMPT, {"role": "assistant", "content": "#34"}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert rendered == "<|system|>s<|im_end|><|user|>17+25-8=<|im_end|><|assistant|>#34<|im_end|>"
    with pytest.raises(Exception, match="The roles are system, user and assistant, not judge"):
        tokenizer.apply_chat_template([{"role": "judge", "content": ""}], tokenize=False)


@pytest.mark.slow
def test_sampled_accuracy_of_student_and_teacher(models, tokenizer):
    problems = ArithmeticTask(num_train=0, num_test=128).problems("test")
    assert 0.25 < measure_accuracy(models["student"], tokenizer, problems, sampled=True) < 0.5
    assert measure_accuracy(models["teacher"], tokenizer, problems, sampled=True) > 0.95


@pytest.mark.parametrize(
    ("left", "sign", "right", "result"),
    [(17, "+", 25, 32), (42, "-", 17, 35), (13, "*", 4, 42), (12, "+", 34, 46), (48, "-", 15, 33), (5, "-", 9, 4)],
)
def test_misjudged_steps(left, sign, right, result):
    assert misjudge(left, sign, right) == result


def test_written_solutions_range_from_right_to_careless():
    assert write_solution("17+25-8", 0.0, random.Random(0)) == solve("17+25-8")
    assert write_solution("17+25-8", 1.0, random.Random(0)) == "17+25=32;32-8=36;#36"


def test_held_out_problems_stay_out_of_the_training_data(tokenizer):
    def drawn(held_out):
        rows, _ = next(draw_batches(tokenizer, 0.0, held_out, random.Random(0)))
        return {re.search(r"<\|user\|>(.*)=<\|im_end\|>", tokenizer.decode(row))[1] for row in rows}

    expressions = drawn(set())
    assert expressions
    assert not expressions & drawn(expressions)


@pytest.mark.slow
def test_making_the_models_twice_gives_the_same_bytes(forks, tmp_path):
    settings = ["--seed", "3", "--steps", "2", "1", "2", "--num-problems", "8"]
    assert forks.run(make.__file__, "--output", tmp_path / "first", *settings).returncode == 0
    command = [sys.executable, "-m", make.__name__, "--output", str(tmp_path / "second"), *settings]
    subprocess.run(command, check=True, capture_output=True)  # its strings have other hashes
    for name in PATHS:
        first, second = tmp_path / "first" / name, tmp_path / "second" / name
        for file in first.iterdir():
            assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    student, teacher = (load_file(tmp_path / "first" / name / "model.safetensors") for name in PATHS)
    assert any(not torch.equal(student[key], teacher[key]) for key in student)
