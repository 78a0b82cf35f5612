"""Run by test_every_method.py as a program: the first step of every method on some processes, its weights in files."""

import sys
from pathlib import Path

import torch
from built_methods import CONFIGS, SGD, Method


def main(num_processes, folder):
    for path in CONFIGS:
        method = Method(path)
        for rate in (0, 1) if num_processes == 1 else (1,):
            optimizer = SGD | {"init_args": {"lr": float(rate)}}
            weights = method.fit(folder / "checkpoints", devices=num_processes, model__optimizer=optimizer)
            torch.save(weights, folder / f"{path.stem}_{rate}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
