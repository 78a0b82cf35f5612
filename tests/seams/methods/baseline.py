"""vOPD (arXiv 2605.07865): subtract the expected reward, which is minus the reverse KL, from every token's reward."""

from dataclasses import replace

from opd_lightning.interfaces import Advantage


class ExpectedReward(Advantage):
    def request(self, needed):
        return replace(needed, full_vocabulary=True)

    def __call__(self, rewards, student_logits, teacher, tokens):
        student = student_logits.log_softmax(-1)
        reverse_kl = (student.exp() * (student - teacher.full())).sum(-1)
        return rewards + reverse_kl
