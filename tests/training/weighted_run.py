"""Run by test_token_weighting.py as a program of its own: weighted steps on some processes, with each normaliser."""

import sys
from pathlib import Path

import torch
from distributed_run import make_strategy
from toys import make_data, make_module, make_trainer, weights_of

from opd_lightning.interfaces import TokenWeighting

NORMALIZERS = ("all_tokens", "kept_tokens", "sequences")


class Fading(TokenWeighting):
    """Later tokens count less."""

    def __init__(self, normalizer):
        self.normalizer = normalizer

    def __call__(self, facts, micro_batch):
        return 0.8**micro_batch.tokens.positions


def main(num_processes, student, teacher, output):
    output = Path(output)
    output.mkdir(exist_ok=True)
    for normalizer in NORMALIZERS:
        module = make_module(
            student,
            teacher,
            token_weighting=Fading(normalizer),
            max_tokens_per_micro_batch=64,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        trainer = make_trainer(output, 2, devices=num_processes, strategy=make_strategy(num_processes))
        trainer.fit(module, make_data())
        torch.save(weights_of(module), output / f"{normalizer}_rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
