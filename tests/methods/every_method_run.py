"""Run by test_every_method.py as a program: the first step of every method on two processes, its weights in files."""

import sys
from pathlib import Path

import torch
from built_methods import CONFIGS, SGD, Method
from forks import keep_spare


def main(folder, address):
    methods = [Method(path, address) for path in CONFIGS]
    keep_spare()  # the second process, to which all methods are known
    for method in methods:
        weights = method.fit(folder / "checkpoints", devices=2, model__optimizer=SGD)
        torch.save(weights, folder / f"{method.name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
