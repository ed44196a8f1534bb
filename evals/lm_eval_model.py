"""A model of this package for EleutherAI's lm-evaluation-harness; needs the eval extra.

    python -m evals.lm_eval_model --ckpt CKPT --tasks arc_easy,hellaswag [--limit N]

Or hand `HarnessLM(ckpt)` to `lm_eval.simple_evaluate(model=...)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError as e:
    sys.exit(f"lm_eval_model.py: error: {e}; pip install -e '.[eval]' brings lm-eval")
from msn_jax import InputError, generate, load
from msn_jax.records import print_record
from msn_jax.score import loglikelihoods, rolling_pairs
from msn_jax.terminal import run_command


class HarnessLM(TemplateLM):
    """Greedy generation by `method`, whose text is that of plain decoding, and likelihoods by `msn_jax.score`."""

    def __init__(
        self,
        ckpt: str,
        adapter: str | None = None,
        method: str = "tr-jacobi",
        dtype: str = "float32",
        batch_size: int = 8,
        max_gen_tokens: int = 256,
    ):
        super().__init__()
        self.lm = load(ckpt, adapter=adapter, dtype=dtype)
        self.tokenizer = self.lm.tokenizer
        self.method, self.batch_size, self.max_gen_tokens = method, batch_size, max_gen_tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: as with the harness's own models BOS, where there is one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.lm.name

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def _loglikelihood_tokens(self, requests: Sequence, disable_tqdm: bool = False, **kwargs):
        most = self.lm.cfg.max_position
        # What does not fit is cut off at the front, as the harness's own models do; the last token need not be read.
        cut = [((context + answer)[-(most + 1) :], min(len(answer), most)) for _, context, answer in requests]
        pairs = [(ids[: len(ids) - n], ids[len(ids) - n :]) for ids, n in cut]
        scores = loglikelihoods(self.lm, pairs, self.batch_size)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        out = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            ids = ids[1:] if ids[:1] == [self.prefix_token_id] else ids
            pairs = rolling_pairs(ids, self.prefix_token_id, self.lm.cfg.max_position)
            out.append(sum(score for score, _ in loglikelihoods(self.lm, pairs, self.batch_size)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), out[-1])
        return out

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        out = []
        for request in requests:
            context, settings = request.args
            # Without sampling a temperature means nothing; without either word of sampling 0 is the default.
            sampled = settings.get("do_sample")
            if settings.get("temperature") if sampled is None else sampled:
                raise InputError(f"generation with {settings}: accepted here: greedy alone")
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            count, most = settings.get("max_gen_toks", self.max_gen_tokens), self.lm.cfg.max_position
            if count >= most:
                raise InputError(f"max_gen_toks = {count}: the model's context is {most}; accepted: below that")
            ids = self.tok_encode(context)[-(most - count) :] or [self.prefix_token_id]
            (result,) = generate(self.lm, [ids], method=self.method, max_new_tokens=count)
            ends = [at for stop in until if stop and (at := result.text.find(stop)) >= 0]
            out.append(result.text[: min(ends, default=len(result.text))])
            self.cache_hook.add_partial("generate_until", request.args, out[-1])
        return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", required=True)
    p.add_argument("--adapter", help="directory of an adapter, see decode.py")
    p.add_argument("--method", default="tr-jacobi")
    p.add_argument("--tasks", required=True)
    p.add_argument("--num_fewshot", type=int)
    p.add_argument("--limit", type=int)
    args = p.parse_args()
    model = HarnessLM(args.ckpt, args.adapter, args.method)
    found = simple_evaluate(model, tasks=args.tasks.split(","), num_fewshot=args.num_fewshot, limit=args.limit)
    print_record(dtype="float32", seed=0, tasks=found["results"])


if __name__ == "__main__":
    run_command(main)
