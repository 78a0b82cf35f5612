"""Write tests/backends/recorded_vllm_answers.json: what a real vLLM server says to the requests we make.

python tests/vllm/record_server.py http://localhost:8000, on a server started as in test_vllm_servers.py.
"""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

REQUESTS = {
    "models": ("/v1/models", None),
    "sampled token": ("/v1/completions", {"prompt": [9, 10, 11, 12], "max_tokens": 1, "prompt_logprobs": 0}),
    "top 3": ("/v1/completions", {"prompt": [9, 10, 11, 12], "max_tokens": 1, "prompt_logprobs": 3}),
    "too many": ("/v1/completions", {"prompt": [9, 10], "max_tokens": 1, "prompt_logprobs": 21}),
    "out of vocabulary": ("/v1/completions", {"prompt": [9, 99999], "max_tokens": 1, "prompt_logprobs": 0}),
    "unknown model": ("/v1/completions", {"model": "x", "prompt": [9], "max_tokens": 1}),
    "rollout": (
        "/v1/completions",
        {
            "prompt": [9, 10, 11],
            "max_tokens": 4,
            "temperature": 0.7,
            "seed": 5,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": [3],
            "ignore_eos": True,
        },
    ),
}


def ask(url, path, body):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def record(url):
    answers = {}
    for name, (path, body) in REQUESTS.items():
        status, answer = ask(url, path, body)
        answers[name] = {"path": path, "body": body, "status": status, "answer": answer}
    return answers


if __name__ == "__main__":
    target = Path(__file__).parent.parent / "backends" / "recorded_vllm_answers.json"
    text = json.dumps(record(sys.argv[1]), indent=1).replace(str(sys.argv[2]), "/models/teacher")
    target.write_text(text + "\n")
