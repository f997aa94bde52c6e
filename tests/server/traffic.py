"""Clients that ask in a loop, and an operator who changes things meanwhile, over real HTTP."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.server.tiny import multipart

TEXTS = ("good book", "an awful film and a bad book", "word1 word2 word3 word4 word5 word6 word7 cheap")
PLAIN_TASKS = ("books", "films", "spam")


class Traffic:
    """Clients that ask in a loop until told to stop, and keep what they were answered."""

    def __init__(self, url: str, num_clients: int = 8) -> None:
        self.answers: list[tuple[str, dict[str, Any]]] = []  # (text, output)
        self.failures: list[str] = []
        self.tasks = list(PLAIN_TASKS)
        self._url = url
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(num_clients)
        self._loops = [self._pool.submit(self._loop, seed) for seed in range(num_clients)]

    def _loop(self, seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.is_set():
                text, mode = chance.choice(TEXTS), chance.choice(("single", "prior"))
                inputs = [{"task": "books", "text": text}, {"task": chance.choice(self.tasks), "text": text}]
                response = client.post("/v1/infer", json={"inputs": inputs, "options": {"mode": mode, "explain": True}})
                if response.status_code == 200:
                    self.answers += [(text, output) for output in response.json()["outputs"]]
                else:
                    self.failures.append(response.text)

    def close(self) -> None:
        self._stop.set()
        for loop in self._loops:
            loop.result(60)
        self._pool.shutdown()


class Admin:
    """Uploads and moves adapters, and notes what each version answers alone."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)
        self.alone: dict[tuple[str, str], dict[str, float]] = {}  # (digest, text) -> scores
        self.gone: set[str] = set()
        self.first_answers_s: list[float] = []

    def upload(self, name: str, files: dict[str, bytes]) -> str:
        response = self._client.post("/v1/adapters", data={"name": name, "task": name}, files=multipart(files))
        assert response.status_code == 201, response.text
        start = time.perf_counter()
        self.learn(response.json()["reference"])
        self.first_answers_s.append(time.perf_counter() - start)
        return str(response.json()["reference"])

    def ask(self, parts: dict[str, Any], head: str, text: str) -> dict[str, Any]:
        body = {"inputs": [{"adapters": parts, "head": head, "text": text}]}
        response = self._client.post("/v1/infer", json=body)
        assert response.status_code == 200, response.text
        return dict(response.json()["outputs"][0])

    def learn(self, reference: str) -> None:
        for text in TEXTS:
            output = self.ask({reference: 1.0}, reference, text)
            self.alone[output["composition"]["adapters"][0]["digest"], text] = output["scores"]

    def change(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        response = self._client.request(method, path, json=body or None)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def close(self) -> None:
        self._client.close()
