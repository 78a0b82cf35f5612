"""What the rollout benchmarks generate: a model whose responses are as long as its prompts ask, and prompts for it.

Two engines draw different tokens from the same seed, so with an ordinary model their responses differ in length and
their speeds say little. The model here counts down instead: the last prompt token says how many tokens are left, every
token is followed by the next smaller one, and zero closes the response. Layers are random and of ordinary size, and
all of them run; embedding and head alone make the count certain. So every engine generates exactly the same tokens.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd_lightning.interfaces import Problem, Prompt, Split, Task
from opd_lightning.interfaces import Tokenizer as StudentTokenizer
from opd_lightning.rollouts.answering import render_prompts

VOCABULARY = 4096
ZERO = 8  # id of the count zero, which closes a response; n tokens to go is id ZERO + n
LONGEST = 1024  # the longest response that can be asked for
CONTEXT = 2048
FIRST_CHARACTER = 32  # the text of token i is the character FIRST_CHARACTER + i
KV_CACHE_BYTES = 2**30
BLOCK_SIZE = 32  # tokens; only whole blocks of a prompt are shared, and the CPU build's own choice is 128
ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": KV_CACHE_BYTES,
    "max_num_seqs": 256,
    "block_size": BLOCK_SIZE,
}
OWN_CORE, SERVER_CORE = {0}, {1}  # where training and where servers run, in the sections that have both
CERTAINTY = 60.0  # logit of the next count, before what the layers take from it; the others' are below 15


@dataclass(frozen=True)
class Size:
    """Shape of a counting model."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int


SIZES = {"10M": Size(256, 10, 4, 2), "35M": Size(512, 10, 8, 4)}


def make_counter(folder: Path, size: Size, seed: int = 0) -> Path:
    """Write a counting model and a tokenizer as the hub would hold them; returns the folder."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=ZERO,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
            embedding.normal_()
            directions = torch.nn.functional.normalize(embedding[ZERO + 1 : ZERO + 1 + LONGEST], dim=1)
            head[ZERO : ZERO + LONGEST] = CERTAINTY / size.hidden**0.5 * directions
    model.generation_config.eos_token_id = [ZERO]
    model.save_pretrained(folder)
    core = Tokenizer(
        models.WordLevel(
            vocab={chr(FIRST_CHARACTER + i): i for i in range(VOCABULARY)}, unk_token=chr(FIRST_CHARACTER + 1)
        )
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=chr(FIRST_CHARACTER),
        unk_token=chr(FIRST_CHARACTER + 1),
        eos_token=chr(FIRST_CHARACTER + ZERO),
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return folder


def long_tailed(num: int, generator: torch.Generator, median: int = 24, spread: float = 1.0, longest: int = 256):
    """Response lengths from a log-normal distribution, cut at both ends: most are short, a few are very long."""
    lengths = median * torch.exp(spread * torch.randn(num, generator=generator))
    return lengths.round().long().clamp(4, longest).tolist()


def make_problems(
    lengths: list[int], prompt_lengths: list[int], generator: torch.Generator, shared: int = 0
) -> list[Problem]:
    """Problems that ask for responses of these lengths; one character is one token.

    Args:
        lengths: Response tokens, the closing one included.
        prompt_lengths: Tokens of each prompt, the count included.
        generator: Draws the other tokens, which mean nothing.
        shared: So many first tokens are the same in all prompts.
    """
    first_filler = ZERO + LONGEST + 1

    def draw(num: int) -> list[int]:
        return torch.randint(first_filler, VOCABULARY, (num,), generator=generator).tolist()

    beginning = draw(shared)
    problems = []
    for i, (length, prompt_length) in enumerate(zip(lengths, prompt_lengths, strict=True)):
        ids = [*beginning, *draw(prompt_length - 1 - shared), ZERO + length]
        content = "".join(chr(FIRST_CHARACTER + token_id) for token_id in ids)
        problems.append(Problem(str(i), ({"role": "user", "content": content},), answer=str(length)))
    return problems


def make_prompts(problems: list[Problem], tokenizer: StudentTokenizer, seed: int, samples: int = 1) -> list[Prompt]:
    """The problems rendered, with seeds."""
    positions = range(len(problems))
    return render_prompts(tokenizer, problems, positions, num_samples=samples, seed_parts=(seed, "benchmark"))


class CountingTask(Task):
    """Count down; right when the response has the length that was asked for."""

    def __init__(self, num_train: int = 1024, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        prompt_lengths = torch.randint(16, 65, (num_train,), generator=generator).tolist()
        self._problems = make_problems(long_tailed(num_train, generator), prompt_lengths, generator)

    def problems(self, split: Split) -> list[Problem]:
        """The same for all splits."""
        return self._problems

    def grade(self, problem: Problem, response: str) -> float:
        """The closing token is not part of the text."""
        return float(len(response) + 1 == int(problem.answer))


class ServerProcess:
    """A vLLM server on this machine, bound to some cores; stopped at the end of the `with` block."""

    def __init__(self, model: Path, log: Path, cores: set[int], max_model_len: int) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        flags: list[object] = ["--model", model, "--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
        flags += ["--max-model-len", max_model_len, "--max-logprobs", 20, "--logprobs-mode", "processed_logprobs"]
        flags += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-seqs", 256]
        flags += ["--kv-cache-memory-bytes", KV_CACHE_BYTES, "--block-size", BLOCK_SIZE, "--no-enable-log-requests"]
        flags += ["--worker-extension-cls", "opd_lightning.backends.vllm.worker.WorkerExtension"]
        flags += ["--weight-transfer-config", '{"backend": "opd_lightning"}']
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, flags)],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )

    def __enter__(self) -> Self:
        until = time.monotonic() + 240
        while time.monotonic() < until and self.process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return self
            time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"The server did not start:\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
