"""Tiny models that vLLM's CPU build can run (its attention wants heads of at least 32), and prompts for them."""

from pathlib import Path

import torch
from conftest import VOCAB_SIZE, make_model, make_tokenizer, save_folder

from opd_lightning.interfaces import Problem, Prompt

NUM_PADDING_ROWS = 14


def make_folder(path: Path, *, seed: int = 1, tied: bool = False, hidden_size: int = 64, **options) -> Path:
    """A random Qwen3 whose head has rows beyond the vocabulary that would win every time if they were looked at."""
    model = make_model(
        seed=seed,
        hidden_size=hidden_size,
        head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        vocab_size=VOCAB_SIZE + NUM_PADDING_ROWS,
        tie_word_embeddings=tied,
        **options,
    )
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB_SIZE:] *= 50
    return save_folder(path, model, make_tokenizer())


def make_prompts(student, lengths=(3, 20, 40, 60), num_seeds=2) -> list[Prompt]:
    """Prompts shorter and longer than a block of vLLM's cache (32 tokens), sharing their beginnings."""
    prompts = []
    for length in lengths:
        problem = Problem(uid=f"ab/{length}", messages=({"role": "user", "content": "ab" * length},), answer="a")
        seeds = tuple(1000 * length + i for i in range(num_seeds))
        prompts.append(Prompt(problem, tuple(student.tokenizer.render(problem.messages)), seeds))
    return prompts


def perturb(model, seed: int, scale: float = 0.05) -> None:
    """Change every trainable weight, as an optimiser step or an EffOPD move does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = 2 * scale if "lora_" in name else scale
                parameter += size * torch.randn(parameter.shape, generator=generator)


def student_log_probs(student, model, rollouts, temperature: float) -> torch.Tensor:
    """The student's own log-probabilities of sampled tokens, end to end."""
    from opd_lightning.rollouts.batching import collate

    batch = collate(rollouts, student.tokenizer.pad_id)
    with torch.no_grad():
        logits = student.head(model)(student.hidden_states(model, batch)) / temperature
    return logits.log_softmax(-1).gather(-1, batch.tokens.ids[:, None]).squeeze(-1)
