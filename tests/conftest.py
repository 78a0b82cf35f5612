"""Tiny real models in Hugging Face format, made once per test session: student and teacher with one tokenizer."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from browser import browser as browser  # a fixture, as the others that are imported here
from forks import forks as forks
from hypothesis import settings
from recorded_runs import copied as copied
from recorded_runs import recorded as recorded

gc.disable()  # until all is imported: half a million objects that stay, which would be looked through again and again
torch.set_num_threads(1)  # several workers share the cores; tiny models lose time on a second thread

# A busy machine is not a failure: the first example of a test also pays for torch's lazy initialisation.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|unk|>"]
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!=+-*/"
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)
END_OF_TEXT, END_OF_TURN = SPECIAL_TOKENS.index("<|endoftext|>"), SPECIAL_TOKENS.index("<|im_end|>")


def make_tokenizer(characters: str = CHARACTERS, **options: Any) -> Any:
    """One token per character, ChatML template, `<|im_end|>` closes a turn."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *characters])}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    settings: dict[str, Any] = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "additional_special_tokens": SPECIAL_TOKENS[1:6],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    return PreTrainedTokenizerFast(tokenizer_object=core, **(settings | options))


def make_model(
    architecture: str = "qwen3", *, seed: int = 0, vocab_size: int = VOCAB_SIZE, spread: float = 3.0, **options: Any
) -> Any:
    """A random model of a well-known architecture, with logits spread enough to make sampling interesting."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": END_OF_TURN,
    }
    config = AutoConfig.for_model(architecture, **(settings | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=spread * parameter.shape[1] ** -0.5)
    return model.eval()


def save_folder(folder: Path, model: Any, tokenizer: Any, eos_token_id: int | list[int] | None = None) -> Path:
    """Write model, generation config and tokenizer as the hub would hold them."""
    model.generation_config.eos_token_id = [END_OF_TURN, END_OF_TEXT] if eos_token_id is None else eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def console_of_this_test():
    """Rich keeps one console for all, and with it the screen that a test has pretended to have."""
    yield
    rich.reconfigure()


@pytest.fixture(scope="session")
def tiny_qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with a character tokenizer. Session-scoped: read it, do not write into it."""
    return save_folder(tmp_path_factory.mktemp("tiny_qwen3"), make_model(seed=1), make_tokenizer())


@pytest.fixture(scope="session")
def tiny_teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random Qwen3, wider, with the same tokenizer and a head padded to a round number of rows."""
    model = make_model(seed=2, hidden_size=48, vocab_size=VOCAB_SIZE + 14)
    return save_folder(tmp_path_factory.mktemp("tiny_teacher"), model, make_tokenizer())
