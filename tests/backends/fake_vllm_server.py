"""A vLLM server without vLLM: the same answers as the real one, in shape and in numbers, from a tiny model in a thread.

`recorded_vllm_answers.json` holds what the real one said (tests/vllm/record_server.py wrote it); a test holds the two
side by side.
"""

import json
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file


class Refusal(Exception):
    def __init__(self, message, *, status=400, kind="BadRequestError", parameter=None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": parameter, "code": status}}


class FakeVLLM:
    """What the server does; its attributes are the ways it can misbehave.

    Attributes:
        raw: What is sent down the wire to every request instead of an answer: chunks of bytes; None for answers.
        tamper: Takes a path and an answer and returns what is sent as JSON in its stead.
        failures: Status codes to answer the next requests with, instead of an answer; 0 drops the connection.
        aborts: Numbers of tokens after which the next responses are called off, as by a shutdown.
        delay: Seconds that every completion takes.
        gate: What completions wait for: an event or a barrier; None for nothing.
        has_begun: Set when one waits.
        requests: Paths and bodies seen.
        authorizations: Their headers of this name.
        max_in_flight: Most completions that were under way at once.
    """

    def __init__(self, folder, *, max_model_len=128, max_logprobs=20, name=None, weight_transfer=True):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.name = name or str(folder)
        self.max_model_len, self.max_logprobs = max_model_len, max_logprobs
        self.logprobs_mode = "processed_logprobs"
        self.weight_transfer = weight_transfer
        self.failures, self.delay, self.requests, self.authorizations = [], 0.0, [], []
        self.aborts = []
        self.raw, self.tamper = None, lambda path, answer: answer
        self.gate, self.has_begun = None, threading.Event()
        self.num_in_flight = self.max_in_flight = 0
        self.weight_version, self.update = "default", None
        self.is_paused = False
        self.lock = threading.Lock()
        self.has_finished = threading.Condition(self.lock)

    # ------------------------------------------------------------------------------------------------------ endpoints

    def answer(self, method, path, body):
        endpoints = {
            ("GET", "/health"): lambda: None,
            ("GET", "/v1/models"): self.list_models,
            ("POST", "/v1/completions"): lambda: self.complete(body),
        }
        if self.weight_transfer:
            endpoints |= {
                ("GET", "/weight_info"): lambda: {"weight_version": self.weight_version},
                ("POST", "/pause"): lambda: self.pause(True),
                ("POST", "/resume"): lambda: self.pause(False),
                ("POST", "/reset_prefix_cache"): lambda: None,
                ("POST", "/init_weight_transfer_engine"): lambda: {"message": "Weight transfer initialized"},
                ("POST", "/start_weight_update"): self.start_update,
                ("POST", "/update_weights"): lambda: self.update_weights(body["update_info"]),
                ("POST", "/finish_weight_update"): lambda: self.finish_update((body or {}).get("weight_version")),
            }
        endpoint = endpoints.get((method, path.partition("?")[0]))
        if endpoint is None:
            raise Refusal("Not Found", status=404)
        return endpoint()

    def list_models(self):
        entry = {"id": self.name, "object": "model", "created": 1, "owned_by": "vllm", "root": self.name}
        entry |= {"parent": None, "max_model_len": self.max_model_len, "permission": []}
        return {"object": "list", "data": [entry]}

    def complete(self, body):
        self._check(body)
        with self.lock:
            self.num_in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.num_in_flight)
        try:
            time.sleep(self.delay)
            if (gate := self.gate) is not None:
                self.has_begun.set()
                assert gate.wait(100) is not False, "nobody opened the gate"
            return self._complete(body)
        finally:
            with self.has_finished:
                self.num_in_flight -= 1
                self.has_finished.notify_all()

    def finish(self):
        """Let every completion that is under way end, whether somebody still wants it or not."""
        gate, self.gate = self.gate, None
        if isinstance(gate, threading.Event):
            gate.set()
        with self.has_finished:
            assert self.has_finished.wait_for(lambda: self.num_in_flight == 0, 100)

    def pause(self, is_paused):
        self.is_paused = is_paused
        return {"status": "paused" if is_paused else "resumed"}

    def start_update(self):
        if self.update is not None:
            raise Refusal("start_weight_update called while a weight update is already active.", status=500)
        self.update = {}
        return {"message": "Weight update started"}

    def update_weights(self, info):
        self.update.update(load_file(info["path"]))
        return {"message": "Weights updated"}

    def finish_update(self, weight_version):
        rows = self.model.get_input_embeddings().weight.shape[0]
        state = self.model.state_dict()
        for name, tensor in self.update.items():
            assert tensor.shape == state[name].shape, (name, tensor.shape, state[name].shape, rows)
            state[name].copy_(tensor)
        self.update = None
        self.weight_version = weight_version or self.weight_version
        return {"message": "Weight update finished"}

    # ------------------------------------------------------------------------------------------------------- internals

    def _check(self, body):
        if body.get("model", self.name) != self.name:
            raise Refusal(
                f"The model `{body['model']}` does not exist.", status=404, kind="NotFoundError", parameter="model"
            )
        if body.get("max_tokens", 16) < 1:
            raise Refusal(f"max_tokens must be at least 1, got {body['max_tokens']}.", parameter="max_tokens")
        num_rows = self.model.get_input_embeddings().weight.shape[0]
        if unknown := [token_id for token_id in body["prompt"] if token_id >= num_rows]:
            raise Refusal(f"Token id {max(unknown)} is out of vocabulary")
        if (k := body.get("prompt_logprobs") or 0) > self.max_logprobs:
            raise Refusal(
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}",
                parameter="prompt_logprobs",
            )
        if len(body["prompt"]) + body.get("max_tokens", 16) > self.max_model_len:
            raise Refusal(f"This model's maximum context length is {self.max_model_len} tokens.")

    @torch.no_grad()
    def _complete(self, body):
        prompt, token_ids, log_probs = body["prompt"], [], []
        logits = self.model(torch.tensor([prompt])).logits[0].float()
        scores = None
        if (k := body.get("prompt_logprobs")) is not None:
            scores = [None, *map(self._entry, prompt[1:], logits[:-1].log_softmax(-1), [k] * (len(prompt) - 1))]
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        temperature = body.get("temperature", 1.0)
        with self.lock:
            abort_after = self.aborts.pop(0) if self.aborts and body.get("max_tokens", 16) > 1 else None
        for i in range(body.get("max_tokens", 16)):
            if i == abort_after:
                break
            last = self.model(torch.tensor([prompt + token_ids])).logits[0, -1].float()
            for token_id, bias in (body.get("logit_bias") or {}).items():
                last[int(token_id)] += bias
            processed = (last / (temperature or 1.0)).log_softmax(-1)
            draw = processed.exp().multinomial(1, generator=generator) if temperature else last.argmax()
            token_ids.append(int(draw))
            told = processed if self.logprobs_mode == "processed_logprobs" else last.log_softmax(-1)
            log_probs.append(float(told[int(draw)]))
            if token_ids[-1] in (body.get("stop_token_ids") or []):
                break
        stopped = bool(token_ids) and token_ids[-1] in (body.get("stop_token_ids") or [])
        texts = [self.tokenizer.decode([token_id]) for token_id in token_ids]
        choice = {
            "index": 0,
            "text": "".join(texts),
            "logprobs": None,
            "finish_reason": "stop" if stopped else "length" if abort_after is None else "abort",
            "stop_reason": token_ids[-1] if stopped else None,
            "token_ids": token_ids if body.get("return_token_ids") else None,
            "prompt_logprobs": scores,
            "prompt_token_ids": prompt if body.get("return_token_ids") else None,
        }
        if body.get("logprobs") is not None and token_ids:
            tops = [{text: value} for text, value in zip(texts, log_probs, strict=True)]
            choice["logprobs"] = {
                "text_offset": [0] * len(texts),
                "token_logprobs": log_probs,
                "tokens": texts,
                "top_logprobs": tops,
            }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(token_ids)}
        usage["total_tokens"] = sum(usage.values())
        return {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": 1,
            "model": self.name,
            "choices": [choice],
            "usage": usage,
        }

    def _entry(self, token_id, log_probs, k):
        ids = [token_id, *(i for i in log_probs.topk(k).indices.tolist() if i != token_id)]
        return {
            str(i): {
                "logprob": max(float(log_probs[i]), -9999.0),
                "rank": int((log_probs >= log_probs[i]).sum()),
                "decoded_token": self.tokenizer.decode([i]),
            }
            for i in ids
        }


def _make_handler(fake):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self._answer("GET", None)

        def do_POST(self):
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer("POST", json.loads(text) if text else None)

        def _answer(self, method, body):
            with fake.lock:
                fake.requests.append((self.path, body))
                fake.authorizations.append(self.headers.get("Authorization"))
                failure = fake.failures.pop(0) if fake.failures else None
            if failure == 0 or self.server.has_stopped:  # connections that are kept alive outlive the listener
                self.close_connection = True
                self.connection.close()
                return
            if fake.raw is not None:
                self.close_connection = True
                for chunk in fake.raw:
                    self.wfile.write(chunk)
                return
            if failure is not None:
                self._send(failure, {"error": {"message": "come back later"}})
                return
            try:
                self._send(200, fake.tamper(self.path, fake.answer(method, self.path, body)))
            except Refusal as refusal:
                self._send(refusal.status, refusal.body)

        def _send(self, status, answer):
            text = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return Handler


@contextmanager
def serve(fake, port=0):
    """Serve in a thread; yields the address."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        has_stopped = False

        def handle_error(self, request, client_address):
            if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that gave up
                super().handle_error(request, client_address)

        request_queue_size = 128

    server = Server(("127.0.0.1", port), _make_handler(fake))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.has_stopped = True
        server.shutdown()
        server.server_close()
        fake.finish()  # an interpreter that ends under a computing thread aborts


def recorded_answers():
    """What a real server said: name to ``{"path", "body", "status", "answer"}``."""
    return json.loads((Path(__file__).parent / "recorded_vllm_answers.json").read_text())
