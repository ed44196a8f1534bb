"""What vs_llama_cpp.py runs in the Python of another environment, one that has llama-cpp-python."""

import json
import sys
import time

from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding


def serve(model: str, context: int, drafts: int, threads: int) -> None:
    """Answer each line {lookup, ids, count, stop} on standard input with the tokens and the seconds after the first."""
    settings = {"n_ctx": context, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    plain = Llama(model, **settings)
    lookup = Llama(model, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=drafts), **settings)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        llama, tokens, first = lookup if asked["lookup"] else plain, [], 0.0
        for token in llama.generate(asked["ids"], temp=0.0, top_k=1, repeat_penalty=1.0):
            first = first or time.perf_counter()
            tokens.append(int(token))
            if len(tokens) == asked["count"] or token in asked["stop"]:
                break
        print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - first}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:]))
