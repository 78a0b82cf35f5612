"""The whole path on real data: GSM8K, a BPE tokenizer trained on it, tiny random models. Quality is not the point."""

import json
from pathlib import Path

import pytest
import torch

from opd_lightning.commands.cli import main

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "gsm8k"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.exists(), reason="GSM8K is not beside the checkout")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()[:3000]]
    core = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = (row["question"] + row["answer"] for row in rows)
    core.train_from_iterator(texts, vocab_size=2000, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    folders = {}
    for seed, (name, rows) in enumerate({"student": 2000, "teacher": 2048}.items()):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=rows,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=1024,
            tie_word_embeddings=name == "student",
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        folders[name] = tmp_path_factory.mktemp(name)
        Qwen3ForCausalLM(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def overrides(models, root):
    sources = {
        split: json.dumps({"path": str(DATA / f"{file}.jsonl"), "limit": 40, "config": None, "split": None})
        for split, file in {"train": "train", "validation": "test", "test": "test"}.items()
    }
    options = {
        "model.student.path": models["student"],
        "model.teacher.path": models["teacher"],
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.default_root_dir": root,
        "data.sampling.max_new_tokens": 24,
        "data.prompts_per_step": 4,
        "data.rollouts_per_prompt": 2,
        "data.num_validation_problems": 6,
        **{f"data.task.init_args.{split}": source for split, source in sources.items()},
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize("config", ["gsm8k_qwen3", "gsm8k_qwen3_lora"])
def test_fit_validate_predict_export(config, models, tmp_path, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = ["--config", str(ROOT / "configs" / f"{config}.yaml"), *overrides(models, tmp_path)]
    every = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    main(["fit", *common, *every])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    main(["validate", *common, "--ckpt_path", str(checkpoint)])
    assert "val/avg_at_1" in capfd.readouterr().out
    main(["predict", *common, "--ckpt_path", str(checkpoint)])
    (answers,) = tmp_path.rglob("answers.jsonl")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 40  # num_validation_problems cuts validation only
    assert rows[0]["uid"].endswith("test/0")
    assert rows[0]["reference"] == "18"
    main(["export", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "model")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    original = AutoModelForCausalLM.from_pretrained(models["student"])
    assert model.config.vocab_size == original.config.vocab_size
    pairs = zip(model.parameters(), original.parameters(), strict=True)
    assert any(not torch.equal(after.float(), before.float()) for after, before in pairs)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == TEMPLATE
