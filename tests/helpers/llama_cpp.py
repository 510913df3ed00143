"""What llama.cpp makes of a GGUF file, asked in a process of its own: `python llama_cpp.py`.

Reads a JSON list of requests and writes a JSON list of answers; keys and values of attention are
kept in float32 and attention is the plain one, so that results differ by rounding only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def ask(model: Path, *requests: dict[str, Any]) -> list[Any]:
    """Return llama.cpp's answers.

    Args:
        model: a GGUF file.
        requests: `{"text"}` for its ids, `{"tokens"}` for the text of ids, `{"ids", "shown"}` for
            what may follow, with log-probabilities, `{"ids", "count"}` for the greedy text.
    """
    import needs

    needs.peer("xllamacpp")
    out = model.with_suffix(".answers.json")
    command = [sys.executable, __file__, str(model), str(out), json.dumps(requests)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr[-2000:]
    answers: list[Any] = json.loads(out.read_text())
    return answers


def log_probabilities(model: Path, ids: Sequence[int], shown: int = 259) -> npt.NDArray[Any]:
    """Return the log-probability of each token of the vocabulary after these.

    `shown` is any token that is whole characters.
    """
    (found,) = ask(model, {"ids": [int(i) for i in ids], "shown": shown})
    values = np.full(len(found), np.nan)
    for token, value in found:
        values[token] = value
    return values


def _main(model: str, out: str, requests: list[dict[str, Any]]) -> None:
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = model
    params.n_ctx, params.warmup = 512, False
    # Its threads wait for each other by turning in circles, which a busy machine does not forgive.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server = llama.Server(params)

    def complete(ids: list[int], count: int, **options: Any) -> Any:
        options |= {"prompt": ids, "max_tokens": count, "temperature": 0, "cache_prompt": False}
        answer = server.handle_completions(options)
        return answer if isinstance(answer, dict) else json.loads(answer)

    def post(path: str, **content: Any) -> Any:
        address, body = f"{server.listening_address}/{path}", json.dumps(content).encode()
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    answers: list[Any] = []
    for request in requests:
        if "text" in request:
            content = request["text"]
            found = post("tokenize", content=content, add_special=True, parse_special=False)
            answers.append(found["tokens"])
        elif "tokens" in request:
            answers.append(post("detokenize", tokens=request["tokens"])["content"])
        elif "count" in request:
            answer = complete(request["ids"], request["count"])
            answers.append(answer["choices"][0]["text"])
        else:
            # Half a character or the end shows no probabilities: a letter is made to follow. Those
            # that are told are the model's own, before any such choice.
            chosen = [[request["shown"], 1000.0]]
            answer = complete(request["ids"], 1, logprobs=1 << 20, logit_bias=chosen)
            listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            answers.append([(row["id"], row["logprob"]) for row in listed])
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
