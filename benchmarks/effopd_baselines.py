"""The baseline that arXiv 2605.11739 compares EffOPD with and that is not shipped, for effopd_speedup.py: AlphaOPD.

AlphaOPD (arXiv 2510.00553 applied to distillation) predicts the final weights from early ones: in every attention and
MLP matrix the leading singular direction of the change so far is followed, as a linear function of a score, to the
score wanted at the end. The other one, ExOPD, is `ExtrapolatedTeacher`.
"""

import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from opd_lightning.extrapolation import SearchReport, Trial, undisturbed
from opd_lightning.interfaces import Score

EARLY_STEPS = tuple(range(2, 17, 2))
_MATRICES = re.compile(r"(self_attn|mlp)\..*weight$")


def leading_direction(change: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vector times its singular value [m], and right singular vector [n], of the largest one."""
    u, s, v_t = torch.linalg.svd(change.double(), full_matrices=False)
    return u[:, 0] * s[0], v_t[0]


def predict_vector(vectors: Tensor, scores: Tensor, target: float) -> Tensor:
    """The vector at which a partial least squares regression with one component expects the target score.

    Components are standardised first, as in the authors' code. Without any spread in scores or vectors there is
    nothing to follow, and the last vector is returned.

    Args:
        vectors: [C, m], one per checkpoint.
        scores: [C], float64.
        target: Score wanted.
    """
    if scores.min() == scores.max() or bool((vectors == vectors[-1]).all()):
        return vectors[-1]
    mean, spread = vectors.mean(0), vectors.std(0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    x, y = (vectors - mean) / spread, scores - scores.mean()
    weights = x.T @ y
    component = x @ (weights / weights.norm())
    loadings = x.T @ component / component.square().sum()
    slope = (component @ y) / component.square().sum()
    return mean + spread * loadings * ((target - scores.mean()) / slope)


def predict_change(changes: Sequence[Tensor], scores: Sequence[float], target: float, *, rescale: bool) -> Tensor:
    """The change [m, n] of one matrix expected at the target score, of rank 1.

    Args:
        changes: Change of the matrix since the start, one per checkpoint.
        scores: Score of each checkpoint.
        target: Score wanted.
        rescale: Multiply by |change| / |its rank-1 part| of the last checkpoint, as arXiv 2510.00553 does when it
            reconstructs (but not when it predicts) weights.
    """
    pairs = [leading_direction(change) for change in changes]
    last, row = pairs[-1]
    aligned = [vector if right @ row >= 0 else -vector for vector, right in pairs]
    predicted = predict_vector(torch.stack(aligned), torch.tensor(scores, dtype=torch.float64), target)
    scale = changes[-1].double().norm() / last.norm() if rescale and last.norm() > 0 else 1.0
    return torch.outer(predicted * scale, row).to(changes[-1].dtype)


class AlphaOPD(Callback):
    """Score early checkpoints, then jump once to the weights predicted for the target score; training goes on there.

    Attention and MLP matrices move, other weights stay. The jump is not checked, as in the paper. `last_search` reports
    each scored checkpoint and the jump, so that its cost is counted like that of EffOPD's searches.

    Args:
        score: Score of a checkpoint.
        target: Score wanted at the end.
        rescale: See `predict_change`.
        steps: Steps after which a checkpoint is taken; the jump follows the last.
    """

    def __init__(self, score: Score, target: float, rescale: bool = False, steps: Sequence[int] = EARLY_STEPS) -> None:
        self.score, self.target, self.rescale, self.steps = score, target, rescale, tuple(steps)
        self.last_search: SearchReport | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where the matrices start."""
        named = pl_module.named_parameters()
        self.weights = {name: weight for name, weight in named if weight.ndim == 2 and _MATRICES.search(name)}
        self.start = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.changes: list[dict[str, Tensor]] = []
        self.scores: list[float] = []

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Take a checkpoint when one is due, and jump after the last."""
        step = trainer.global_step
        if step not in self.steps:
            return
        clock, tokens = time.perf_counter(), getattr(self.score, "tokens", 0)
        self.changes.append({name: weight - self.start[name] for name, weight in self.weights.items()})
        with undisturbed(pl_module, seed=step):
            self.scores.append(self.score(trainer, pl_module))
        best, norm = Trial(0.0, self.scores[-1]), 0.0
        if step == self.steps[-1]:
            norm = self._jump()
            pl_module.on_weights_moved()
            best = Trial(1.0, self.target)
        seconds, tokens = time.perf_counter() - clock, getattr(self.score, "tokens", 0) - tokens
        self.last_search = SearchReport(step, self.scores[-1], (best,), best, norm, float("nan"), seconds, tokens)

    def _jump(self) -> float:
        """Move; returns the norm of the predicted change since the start over that of the last checkpoint's."""
        predicted = {
            name: predict_change(
                [change[name] for change in self.changes], self.scores, self.target, rescale=self.rescale
            )
            for name in self.weights
        }
        for name, weight in self.weights.items():
            weight.copy_(self.start[name] + predicted[name])
        norms = [torch.stack([change.norm() for change in of.values()]).norm() for of in (predicted, self.changes[-1])]
        return float(norms[0] / norms[1])
