"""Run by test_effopd_distributed.py as a program of its own: fits on one or two processes, results in files."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset

from opd_lightning import EffOPD, EffOPDOptimizer, HeldOutLoss
from opd_lightning.extrapolation import AnchoredWeights

MAX_STEPS = 8


def make_loader(num_batches, seed, batch_size=4):
    x = torch.randn(batch_size * num_batches, 6, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).tanh()), batch_size=batch_size)


class Stream:
    """Eight rows per step, dealt over the processes; goes on after a resume where the saved run stopped."""

    def __init__(self, rank, num_processes):
        self.tensors, self.position = make_loader(MAX_STEPS, seed=1, batch_size=8).dataset.tensors, 0
        self.rank, self.num_processes = rank, num_processes

    def __len__(self):
        return MAX_STEPS

    def __iter__(self):
        while self.position < MAX_STEPS:
            self.position += 1
            rows = slice(8 * (self.position - 1) + self.rank, 8 * self.position, self.num_processes)
            yield [tensor[rows] for tensor in self.tensors]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Adapted(nn.Module):
    """A frozen layer with a low-rank addition."""

    def __init__(self):
        super().__init__()
        self.fixed = nn.Linear(6, 9).requires_grad_(False)
        self.lora_A = nn.Linear(6, 3, bias=False)
        self.lora_B = nn.Linear(3, 9, bias=False)

    def forward(self, x):
        return self.fixed(x) + self.lora_B(self.lora_A(x))


class Regression(LightningModule):
    def __init__(self, sharded):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(Adapted(), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 1))
        self.sharded = sharded

    def configure_model(self):
        if self.sharded and not isinstance(self.net[2].weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[2], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def train_dataloader(self):
        return Stream(self.trainer.global_rank, self.trainer.world_size)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam([w for w in self.net.parameters() if w.requires_grad], lr=3e-3)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def fit(kind, folder, *, max_steps=MAX_STEPS, score=None, ckpt_path=None, **options):
    num_processes = 1 if kind == "single" else 2
    sharded = kind.startswith("fsdp")
    strategy = "auto"
    if kind == "ddp":
        strategy = DDPStrategy(process_group_backend="gloo")
    elif sharded:
        strategy = ModelParallelStrategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            save_distributed_checkpoint=kind == "fsdp",
            process_group_backend="gloo",
        )
    reports = []

    class Noted(EffOPD):
        def on_train_batch_end(self, *args):
            before = self.last_search
            super().on_train_batch_end(*args)
            if self.last_search is not before:
                reports.append(self.last_search)

    # five batches on two processes: one of them scores a batch only to keep pace
    effopd = Noted(score or HeldOutLoss(make_loader(5, seed=9), num_batches=5), **options)
    saver = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = Trainer(
        accelerator="cpu",
        devices=num_processes,
        strategy=strategy,
        max_steps=max_steps,
        callbacks=[saver, effopd],
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=2,  # a forward pass without gradients right before steps 1, 3, 5, 7
    )
    module = Regression(sharded)
    trainer.fit(module, val_dataloaders=make_loader(2, seed=3), ckpt_path=ckpt_path)
    weights = {name: whole(weight) for name, weight in module.named_parameters()}
    return trainer, module, weights, reports


def note(folder, name, rank, weights, reports):
    facts = [
        {"step": r.step, "factor": r.best.factor, "scores": [t.score for t in r.trials], "baseline": r.baseline}
        | {"norm": r.delta_norm, "cosine": r.cosine}
        for r in reports
    ]
    (folder / f"{name}-{rank}.json").write_text(json.dumps(facts))
    torch.save(weights, folder / f"{name}-{rank}.pt")


def check_sums():
    """Replicated and sharded weights side by side: norm and cosine count each entry once."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    points = [{n: torch.randn(5, 3, generator=generator) for n in ("plain", "copied", "cut")} for _ in range(3)]
    make = {
        "plain": lambda t: t.clone(),
        "copied": lambda t: distribute_tensor(t.clone(), mesh, [Replicate()]),
        "cut": lambda t: distribute_tensor(t.clone(), mesh, [Shard(0)]),
    }
    parameters = {name: nn.Parameter(make[name](tensor)) for name, tensor in points[0].items()}
    anchored = AnchoredWeights(parameters)
    measured = []
    for point in points[1:]:
        with torch.no_grad():
            for name, weight in parameters.items():
                weight.copy_(make[name](point[name]))
        measured.append(anchored.measure())
        anchored.begin()
        anchored.end(moved=False)
    flat = [torch.cat([tensor.flatten() for tensor in point.values()]) for point in points]
    deltas = [flat[1] - flat[0], flat[2] - flat[1]]
    for (norm, _), delta in zip(measured, deltas, strict=True):
        torch.testing.assert_close(norm, float(delta.norm()), rtol=1e-5, atol=0)
    torch.testing.assert_close(measured[1][1], float(torch.cosine_similarity(*deltas, dim=0)), rtol=1e-5, atol=0)


def check_wrapper(rank):
    """The optimiser wrapper on sharded weights, against the same loop on whole ones."""
    ends = []
    for sharded in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        if sharded:
            fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        x, y = make_loader(1, seed=1).dataset.tensors

        def loss(net=net, x=x, y=y):
            return nn.functional.mse_loss(net(x), y)

        if sharded:
            try:
                unaware = EffOPDOptimizer(optimizer, lambda: 0.0)
                unaware.step()
            except ValueError as error:
                assert "module: expected the model, because its weights are sharded" in str(error)  # noqa: PT017
            else:
                raise AssertionError("sharded weights need the module")
        wrapped = EffOPDOptimizer(optimizer, lambda loss=loss: -float(loss()), module=net)
        for _ in range(5):
            wrapped.zero_grad()
            loss().backward()
            wrapped.step()
        assert wrapped.last_search.accepted
        wrapped.load_state_dict(wrapped.state_dict())
        ends.append([whole(weight) for weight in net.parameters()])
    for plain, sharded in zip(*ends, strict=True):
        torch.testing.assert_close(plain, sharded, rtol=1e-5, atol=1e-6)


def main(kind, folder):
    folder = Path(folder)
    trainer, _, weights, reports = fit(kind, folder / kind, backward=(-0.5,), lora="product")
    rank = trainer.global_rank
    note(folder, kind, rank, weights, reports)
    if kind == "single":
        return
    for stop in (3, 4):  # between two searches, and at one
        path = folder / kind / "checkpoints" / f"step={stop}.ckpt"
        _, _, weights, reports = fit(
            kind, folder / f"{kind}-again{stop}", backward=(-0.5,), lora="product", ckpt_path=path
        )
        note(folder, f"{kind}-again{stop}", rank, weights, reports)
    if kind == "ddp":
        # each process on its own would decide otherwise: one likes to move, the other does not
        def torn(module):
            size = float(sum(weight.abs().sum() for weight in module.parameters()))
            return size if dist.get_rank() == 0 else -1.5 * size

        _, _, weights, reports = fit(kind, folder / "torn", score=torn)
        note(folder, "torn", rank, weights, reports)
        check_sums()
    if kind == "fsdp":
        check_wrapper(rank)
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
