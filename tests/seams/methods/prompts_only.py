"""A task without answers: nothing is graded, and validation reports the divergence from the teacher."""

from opd_lightning.interfaces import Problem, Task


class Sums(Task):
    def problems(self, split):
        first = {"train": 10, "validation": 50, "test": 70, "predict": 90}[split]
        return [
            Problem(uid=f"{split}/{n}", messages=({"role": "user", "content": f"{n}+7"},), answer=None)
            for n in range(first, first + 16)
        ]
