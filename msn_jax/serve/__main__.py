"""Serve a model over the OpenAI protocol.

python -m msn_jax.serve --ckpt smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import jax

from msn_jax import kernels, load
from msn_jax.decode.engine import Engine
from msn_jax.decode.generate import STREAM_CYCLES
from msn_jax.decode.tree_sets import METHODS, TREE_SETS, given_draft
from msn_jax.errors import InputError, named
from msn_jax.io.loading import ACCEPTED, ADAPTER_HELP, DTYPES
from msn_jax.serve.worker import Worker
from msn_jax.sharding import make_mesh
from msn_jax.terminal import CACHE_HELP, run_command

KEY = "MSN_JAX_API_KEY"


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m msn_jax.serve",
        description=__doc__.split("\n")[0],
        epilog=f"Where the environment has {KEY}, requests must bring it as their API key. {CACHE_HELP}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--ckpt", required=True, help=f"checkpoint: {ACCEPTED}")
    p.add_argument("--adapter", nargs="+", action="extend", metavar="DIR", help=ADAPTER_HELP)
    small = p.add_mutually_exclusive_group()
    small.add_argument("--draft_ckpt", help="a smaller checkpoint of the same vocabulary, for --method draft-model")
    small.add_argument("--draft_layers", type=int, help="or so many of the model's own first layers")
    p.add_argument("--name", help="of the model in the protocol; default: the last part of --ckpt")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all of this machine")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights and computation, int8 of weights")
    p.add_argument("--tensor", type=int, default=1, help="devices to spread the model over")
    p.add_argument("--method", default="tr-jacobi", choices=METHODS, help="how to draft")
    p.add_argument("--tree", help=f"a file of --tune_out, or {', '.join(TREE_SETS)}; default: the best of the backend")
    p.add_argument("--batch_size", type=int, default=8, help="replies decoded side by side")
    p.add_argument(
        "--max_waiting", type=int, default=64, help="replies that may wait for a row; more are refused (429)"
    )
    args = p.parse_args()
    try:
        import uvicorn

        from msn_jax.serve.app import make_app
    except ImportError as e:
        raise InputError(f"the server needs {e.name}; pip install -e '.[serve]' in the checkout") from None

    draft, by = given_draft(args)  # an impossible setting is refused before the weights are read
    for name, least, most in (("port", 0, 65535), ("batch_size", 1, 2**16), ("max_waiting", 0, 2**31)):
        if not least <= getattr(args, name) <= most:
            raise InputError(f"--{name} {getattr(args, name)}: accepted: {least} to {most}")
    if not 1 <= args.tensor <= jax.device_count():
        raise InputError(f"--tensor {args.tensor}: accepted: 1 to {jax.device_count()}, the devices that there are")
    mesh = make_mesh(tensor=args.tensor) if args.tensor > 1 else None
    with named(ckpt="--ckpt", adapter="--adapter", draft=by):
        lm = load(args.ckpt, args.adapter, args.dtype, mesh, draft)
    if lm.backend == "cpu":
        print(f"{args.dtype} on {kernels.describe()}", file=sys.stderr)
    settings = dict(method=args.method, tree=args.tree, batch_size=args.batch_size, cycles=STREAM_CYCLES, keep=True)
    worker = Worker(Engine(lm, **settings), args.max_waiting)
    name = args.name or Path(args.ckpt).name
    app = make_app(lm, worker, name, os.environ.get(KEY) or None)
    print(f"{name} will answer at http://{args.host}:{args.port}/v1 when it has compiled", file=sys.stderr)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    run_command(main)
