"""What the loaders yield: batches of problems, never text already generated.

`PromptStream` for training, `HeldOutBatches` for validation, test and predict; both split over ranks here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from opd_lightning.interfaces import Problem, PromptBatch, PromptSelector

T = TypeVar("T")


class PromptStream(Iterable[PromptBatch]):
    """Sized, stateful stream of prompt batches; Lightning saves and restores it with the training loop.

    What is saved is the state after the last *committed* step, so that a checkpoint written while a step is under way
    does that step again. Its length is one pass over the selector's problems, and nominal where rollouts are used
    several times. It must have one: Lightning draws one batch ahead from a loader without length, and the selector
    would then choose without the last step's outcomes.

    Args:
        problems: All training problems.
        selector: Chooses among them.
        batch_size: Problems of one step, over all processes.
        num_steps_wanted: Asked before each step: for how many steps to choose problems; 0 yields the last ones again,
            as not new.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        selector: PromptSelector,
        batch_size: int,
        num_steps_wanted: Callable[[], int] = lambda: 1,
    ) -> None:
        self.problems = problems
        self.selector = selector
        self.batch_size = batch_size
        self.num_steps_wanted = num_steps_wanted
        self.step = 0  # batches yielded since the start of training
        self._ahead: list[int] = []  # indices of the next batch, where it is chosen already
        self._asked: list[int] = []  # indices of the last batch
        self.rank, self.world_size = 0, 1
        self.commit()

    def __len__(self) -> int:
        """Steps in one pass."""
        return -(-self.selector.epoch_length // self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        """Yield what is left of the current pass, or a whole new one, from the last committed step on."""
        self.load_state_dict(self._committed)
        for _ in range(self.step % len(self), len(self)):
            if num_steps := self.num_steps_wanted():
                self._asked = self._ahead or self.selector.select(num_steps * self.batch_size)
                self._ahead = []
            self.step += 1
            yield self._make_batch(self._asked, self.step - 1, is_new=num_steps > 0)

    def draw_ahead(self) -> PromptBatch:
        """Choose now what will be yielded next, and return it."""
        self._ahead = self.selector.select(self.batch_size)
        return self._make_batch(self._ahead, self.step, is_new=True)

    def _make_batch(self, indices: Sequence[int], step: int, *, is_new: bool) -> PromptBatch:
        mine = range(self.rank, len(indices), self.world_size)
        return PromptBatch(
            problems=[self.problems[indices[i]] for i in mine],
            indices=[indices[i] for i in mine],
            positions=list(mine),
            step=step,
            is_new=is_new,
        )

    def commit(self) -> None:
        """Declare the last batch trained: from now on checkpoints continue after it."""
        self._committed = {
            "step": self.step,
            "batch_size": self.batch_size,
            "selector": self.selector.state_dict(),
            "ahead": list(self._ahead),
            "asked": list(self._asked),
        }

    def state_dict(self) -> dict[str, Any]:
        """Position of the stream and state of the selector after the last committed step."""
        return self._committed

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: The checkpoint was written with another number of prompts per step.
        """
        if state["batch_size"] != self.batch_size:
            raise ValueError(
                f"data.prompts_per_step: the checkpoint was written with {state['batch_size']}, this run has"
                f" {self.batch_size}. Resume with the same number, or start a new run from the checkpoint's weights."
            )
        self.step = state["step"]
        self.selector.load_state_dict(state["selector"])
        self._ahead, self._asked = list(state.get("ahead", ())), list(state.get("asked", ()))  # absent from older ones
        self.commit()


class HeldOutBatches(Iterable[PromptBatch]):
    """Held-out problems of this rank. Not a `DataLoader`: Lightning would split those over ranks a second time."""

    def __init__(self, batches: list[PromptBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        """Yield the batches in order."""
        return iter(self.batches)


def held_out_batches(problems: Sequence[Problem], size: int, rank: int, world_size: int) -> HeldOutBatches:
    """The rank's share of the problems, `size` at a time.

    All ranks get as many batches, so the last may be empty: they enter the loop together, and some engines and
    recordings need all of them for every batch.
    """
    mine = list(range(rank, len(problems), world_size))
    most = -(-len(problems) // world_size)
    chunks = [mine[start : start + size] for start in range(0, max(1, most), size)]
    return HeldOutBatches([PromptBatch([problems[i] for i in chunk], chunk, chunk, step=0) for chunk in chunks])


def join_shares(shares: Sequence[Sequence[T]]) -> list[T]:
    """What the ranks hold, by rank, in the global order of the positions that were dealt out to them."""
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]
