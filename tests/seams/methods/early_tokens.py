"""Early tokens count more: the weight halves every `half_life` tokens."""

from opd_lightning.interfaces import TokenWeighting


class EarlyTokens(TokenWeighting):
    normalizer = "kept_tokens"

    def __init__(self, half_life: float = 20.0):
        self.half_life = half_life

    def __call__(self, facts, micro_batch):
        return 0.5 ** (micro_batch.tokens.positions / self.half_life)
