"""A model behind OpenAI's chat interface, made of rules: answers of many letters meet more criteria."""

import json
import re
import threading


class FakeChat:
    """What `fake_vllm_server.serve` serves.

    Attributes:
        replies: What is replied to the next questions that contain a text: text to a list of replies.
        measure: The number of an answer that criteria ask about.
        requests, failures, raw, tamper: As those of `FakeVLLM`.
    """

    def __init__(self):
        self.requests, self.authorizations, self.failures = [], [], []
        self.raw, self.tamper = None, lambda path, answer: answer
        self.lock = threading.Lock()
        self.replies = {}
        self.measure = lambda answer: len(set(answer))

    def answer(self, method, path, body):
        assert (method, path) == ("POST", "/v1/chat/completions")
        question = body["messages"][-1]["content"]
        with self.lock:
            text = next((waiting.pop(0) for key, waiting in self.replies.items() if key in question and waiting), None)
        message = {"role": "assistant", "content": self.reply(question) if text is None else text}
        return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}

    def reply(self, question):
        if '{"criteria"' in question:
            criteria = [{"text": f"more letters than {n}", "weight": n} for n in (1, 3, 6)]
            return "Here they are:\n```json\n" + json.dumps({"criteria": criteria}) + "\n```"
        if '{"marks"' in question:
            answer = question.split("Answer:\n")[1].split("\n\nDoes the answer")[0]
            bounds = map(int, re.findall(r"more letters than (\d+)", question))
            return json.dumps({"marks": [int(self.measure(answer) > bound) for bound in bounds]})
        return "The answer is 4."

    def finish(self):
        pass
