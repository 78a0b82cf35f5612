"""Run by test_every_method.py as a program: the first step of every method on two processes, its weights in files."""

import sys
from pathlib import Path

import torch
from built_methods import CONFIGS, SGD, Method


def main(folder):
    for path in CONFIGS:
        weights = Method(path).fit(folder / "checkpoints", devices=2, model__optimizer=SGD)
        torch.save(weights, folder / f"{path.stem}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
