"""Every setting of a run, as frozen dataclasses. No arrays, no jax."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from msn_jax.errors import InputError, check_fields
from msn_jax.settings import check_settings, setting
from msn_jax.shapes import SHAPES

MOST_LOGPROBS = 20  # likeliest tokens of which log-probabilities are given, as in the OpenAI protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How to generate. All but `method`, `tree` and `batch_size` are traced: changing them compiles nothing."""

    method: str = setting("tr-jacobi", "how to draft, see decode.tree_sets.METHODS")
    tree: str | None = setting(
        None, "token trees; null: those measured best for the backend, see decode.tree_sets.tree_set"
    )
    max_new_tokens: int = setting(256, "tokens to generate at most", least=1)
    batch_size: int = setting(1, "prompts decoded side by side", least=1)
    temperature: float = setting(
        0.0, "of the distribution that tokens are drawn from", least=0, below=math.inf, accepted="0 (greedy) or above"
    )
    top_k: int = setting(
        0, "draw among the k likeliest tokens", least=0, below=2**31, accepted="0 (all tokens) or more, below 2**31"
    )
    top_p: float = setting(1.0, "draw among the likeliest tokens that sum up to p", above=0, most=1)
    min_p: float = setting(0.0, "draw among tokens at least so likely as this share of the likeliest", least=0, most=1)
    repetition_penalty: float = setting(
        1.0,
        "divides the positive scores of tokens that occurred, multiplies the negative; 1 none",
        above=0,
        below=math.inf,
    )
    seed: int = setting(0, "of the draws", least=0, below=2**32, accepted="0 to 2**32 - 1")
    stop: list[str] = setting(about="texts before which a reply ends", factory=list)
    logprobs: int | None = setting(
        None,
        "give the log-probability of each token, and of so many likeliest in its place",
        least=0,
        most=MOST_LOGPROBS,
    )

    def __post_init__(self):
        check_settings(self, "")
        texts = all(isinstance(stop, str) and stop for stop in self.stop)
        check_fields(self, "", stop=(texts, "a list of texts, none of them empty"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Noise of the training inputs (Make Some Noise, section 3.1). Static under jit."""

    kind: str = setting(
        "ahead",
        "ahead: tokens before it in its example; random: the whole vocabulary; none: plain tuning",
        choices=("ahead", "random", "none"),
    )
    length: int = setting(5, "L: tokens of a noise segment", least=1)
    segments: int = setting(1, "segments an example; 1 as in the paper", least=1)
    density: float = setting(
        0.0, "above 0, instead of `segments`: the share of response tokens under noise", least=0, most=0.9
    )
    progressive_steps: int = setting(0, "above 0: L grows from 1 to `length` over so many steps", least=0)
    layout: str = setting(
        "inline",
        "inline: in the text, as in the paper; beside: in chains under anchors of a clean text",
        choices=("inline", "beside"),
    )
    mark: bool = setting(
        False, "a learned embedding for each depth in place of a token's, so that noise is told from text"
    )
    anchors: int = setting(
        32, "of `beside` and lora.draft_only, instead of segments: places in a row that noise hangs under", least=1
    )
    weight: float = setting(
        0.5,
        "of `beside`: what the noise's mean loss counts against that of the clean text",
        least=0,
        below=math.inf,
        accepted="0 or more",
    )
    target: str = setting(
        "label",
        "of `beside`: label; model: the clean text's own prediction at that place",
        choices=("label", "model"),
    )
    loss: str = setting(
        "kl",
        "against a prediction: kl; l1: 0.1 cross entropy + 0.9 L1; overlap: -log of the common mass",
        choices=("kl", "l1", "overlap"),
    )
    decay: float = setting(
        1.0,
        "of `beside`, lora.draft_only and heads: the share that the loss of each depth counts of the one before",
        above=0,
        most=1,
    )
    vocab_size: int = setting(0, "of `random`; make_train_step fills in the model's", least=0)

    def __post_init__(self):
        check_settings(self, "noise.")
        some = self.kind != "none"
        check_fields(
            self,
            "noise.",
            layout=(self.layout == "inline" or some, "inline, or beside with a noise.kind that is not none"),
            mark=(not self.mark or some, "true with a noise.kind that is not none"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSource:
    """Rows to train on."""

    path: str = setting(about="a .jsonl, .jsonl.gz or .parquet file, a hub id (org/name or org/name:subset), or stdlib")
    weight: float = setting(1.0, "how often its examples are drawn, against the other sources", above=0)
    split: str = setting("train", "of a hub id")

    def __post_init__(self):
        check_settings(self, "data.sources.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and how rows become batches."""

    sources: list[DataSource] = setting(
        about="what to train on: a list of {path, weight, split}; path: a .jsonl, .jsonl.gz or .parquet file, a hub id "
        "(org/name or org/name:subset), or stdlib",
        factory=list,
    )
    max_tokens: int = setting(2048, "T: tokens of a packed row; longer examples are skipped", least=8)
    packing_bins: int = setting(
        64, "rows filled side by side: more of them waste less, and mix epochs further", least=1
    )
    held_out: int = setting(0, "examples of each source kept for evaluation", least=0)
    chat_template: str | None = setting(None, "null: the tokenizer's; plain; or a .jinja file")

    def __post_init__(self):
        check_settings(self, "data.")
        check_fields(self, "data.", sources=(len(self.sources) > 0, "a list with at least one {path: ...}"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelStart:
    """What to fine-tune, or the shape of a model to train from random weights."""

    ckpt: str | None = setting(None, "what to fine-tune: whatever --ckpt of decode.py takes, but a run")
    shape: str | None = setting(None, "what --plan plans, and the shape that `ckpt` must have", choices=(None, *SHAPES))
    scratch: dict[str, Any] | None = setting(
        None,
        "instead of `ckpt`: fields of ModelConfig, for random weights; a tokenizer of that vocabulary is trained on "
        "the data",
    )

    def __post_init__(self):
        check_settings(self, "model.")
        check_fields(
            self,
            "model.",
            ckpt=((self.ckpt is None) != (self.scratch is None), "one of model.ckpt and model.scratch"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation and what it writes."""

    out: str = setting(about="run directory, local or gs://; the same command goes on from where it stands")
    steps: int = setting(about="optimiser steps of the whole run", least=1)
    batch_size: int = setting(8, "packed rows a step, over all devices", least=1)
    accumulate: int = setting(1, "parts that a batch is split into, one after the other", least=1)
    learning_rate: float = setting(2e-5, "the highest, after warm-up", above=0, below=1)
    warmup_steps: int = setting(0, "steps over which the learning rate grows", least=0)
    final_learning_rate: float = setting(0.1, "where the cosine ends, as a share of learning_rate", least=0, most=1)
    weight_decay: float = setting(0.0, "of the linear maps", least=0, below=1)
    beta2: float = setting(0.95, "of AdamW", above=0, below=1)
    clip_norm: float = setting(1.0, "gradients are scaled down to this norm", above=0)
    dtype: str = setting(
        "float32",
        "of matrix products; weights and optimiser state are float32",
        choices=("float32", "bfloat16"),
    )
    activation_dtype: str | None = setting(
        None,
        "of what stands between products; null: as train.dtype. On CPU take float32",
        choices=(None, "float32", "bfloat16"),
    )
    remat: str = setting(
        "full",
        "what is kept for the backward pass: full: each layer's input; dots: its matrix products too; none: everything",
        choices=("full", "dots", "none"),
    )
    head_chunk: int = setting(128, "tokens of a row whose logits exist at one time", least=1)
    seed: int = setting(
        0, "of weights, noise and the order of examples", least=0, below=2**32, accepted="0 to 2**32 - 1"
    )
    save_every: int = setting(500, "steps between checkpoints; the last step is always saved", least=1)
    keep: int = setting(2, "last checkpoints kept, beside the best", least=1)
    eval_every: int = setting(0, "steps between evaluations, which need data.held_out; 0: never", least=0)
    eval_batches: int = setting(8, "batches of an evaluation", least=1)

    def __post_init__(self):
        check_settings(self, "train.")
        check_fields(
            self,
            "train.",
            out=(bool(self.out.strip()), "a directory"),
            accumulate=(self.batch_size % self.accumulate == 0, f"a divisor of train.batch_size {self.batch_size}"),
            warmup_steps=(self.warmup_steps < self.steps, "0 or more, below train.steps"),
            activation_dtype=(self.activation_dtype in (None, "float32", self.dtype), f"null, float32, {self.dtype}"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are laid out. -1: all that the other axes leave."""

    data: int = setting(1, "devices that split the batch alone; -1: all that the other axes leave")
    fsdp: int = setting(-1, "devices that split batch and weights; -1: all that the other axes leave")
    tensor: int = setting(1, "devices that split heads and layers' widths; -1: all that the other axes leave")
    topology: str | None = setting(None, "the TPU slice that the config is meant for, such as v5p:2x2x2")
    distributed: bool = setting(False, "several processes: jax.distributed finds the others, as on a pod")

    def __post_init__(self):
        check_settings(self, "mesh.")
        sizes = (self.data, self.fsdp, self.tensor)
        check_fields(
            self,
            "mesh.",
            data=(all(n == -1 or n >= 1 for n in sizes) and sizes.count(-1) <= 1, "1 or more, one of the axes -1"),
        )


LINEAR_MAPS = ("qkv", "o", "gate_up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) in place of full fine-tuning."""

    rank: int = setting(0, "of the adapters; 0: tune all weights", least=0)
    alpha: float = setting(16.0, "the adapter's output is scaled by alpha / rank", above=0)
    targets: list[str] = setting(
        about="the linear maps that get one", factory=lambda: list(LINEAR_MAPS), accepted=f"some of {list(LINEAR_MAPS)}"
    )
    draft_only: bool = setting(False, "act at noise positions alone, and learn the frozen model's own predictions")
    draft_layers: int = setting(
        0, "above 0: so many first layers alone, which learn to be a smaller model that drafts for this one", least=0
    )
    store: str | None = setting(
        None,
        "dtype of the adapter's file; null: float16 if draft_only or draft_layers, else float32",
        choices=(None, "float32", "float16", "int8"),
    )

    def __post_init__(self):
        check_settings(self, "lora.")
        check_fields(
            self,
            "lora.",
            draft_only=(not self.draft_only or self.rank > 0, "true with lora.rank above 0"),
            draft_layers=(
                not self.draft_layers or (self.rank > 0 and not self.draft_only),
                "above 0 with lora.rank above 0 and without lora.draft_only",
            ),
            targets=(bool(self.targets) and set(self.targets) <= set(LINEAR_MAPS), f"some of {list(LINEAR_MAPS)}"),
        )

    @property
    def stored_dtype(self) -> str:
        # What a draft-only adapter drafts is verified, and half the room is enough.
        return self.store or ("float16" if self.draft_only or self.draft_layers else "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Heads of a frozen model that predict further ahead: a way to draft without noise, to compare with."""

    kind: str | None = setting(
        None, "medusa (Cai et al. 2024), eagle (EAGLE-3, Li et al. 2025); null: none", choices=(None, "medusa", "eagle")
    )
    count: int = setting(
        4, "tokens ahead that are learnt: heads of medusa, each for one more; steps of eagle on its own output", least=1
    )
    vocabulary: int = setting(8192, "of eagle: tokens that it may draft, the most frequent of the replies", least=1)

    def __post_init__(self):
        check_settings(self, "heads.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything of a training run: the sections of a file in configs/."""

    model: ModelStart
    data: DataConfig
    noise: NoiseConfig = dataclasses.field(default_factory=NoiseConfig)
    train: TrainConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    heads: HeadsConfig = dataclasses.field(default_factory=HeadsConfig)

    def __post_init__(self):
        if self.heads.kind and (self.lora.rank or self.noise.kind != "none"):
            raise InputError(
                f"heads.kind = {self.heads.kind}: heads learn clean text beside a frozen model; "
                "accepted: with noise.kind none and lora.rank 0"
            )
        if self.lora.draft_layers and self.noise.kind != "none":
            raise InputError(
                f"lora.draft_layers = {self.lora.draft_layers}: a model that drafts learns clean text; "
                "accepted: with noise.kind none"
            )
        plain = NoiseConfig()
        for name in ("layout", "mark"):
            if self.lora.draft_only and getattr(self.noise, name) != getattr(plain, name):
                raise InputError(
                    f"noise.{name} = {getattr(self.noise, name)}: noise of a draft-only adapter hangs beside the text "
                    "and has embeddings of its own; accepted: without lora.draft_only"
                )

    @property
    def objective(self) -> str:
        """What the run learns: the name of a module of objectives/."""
        beside = "draft_only" if self.lora.draft_only else "draft_layers" if self.lora.draft_layers else None
        return self.heads.kind or beside or self.noise.layout

    @property
    def depths(self) -> int:
        """How many places ahead the run learns of, beside the next token."""
        return self.heads.count if self.heads.kind else 1 if self.lora.draft_layers else self.noise.length

    @property
    def frozen(self) -> bool:
        """Whether the model's own weights stay, and something beside them is trained."""
        return self.lora.rank > 0 or self.heads.kind is not None

    @classmethod
    def from_dict(cls, sections: dict[str, Any]) -> RunConfig:
        """The inverse of dataclasses.asdict."""
        # A run of an earlier version has no heads.
        made = {name: kind(**sections.get(name, {})) for name, kind in SECTIONS.items() if name != "data"}
        sources = [DataSource(**source) for source in sections["data"]["sources"]]
        return cls(data=DataConfig(**{**sections["data"], "sources": sources}), **made)

    def with_absolute_base(self) -> RunConfig:
        """The same settings with the whole path of a local model.ckpt, so that the run finds it from anywhere."""
        ckpt = self.model.ckpt
        if ckpt is None or not os.path.exists(ckpt):
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, ckpt=os.path.abspath(ckpt)))


SECTIONS = {
    "model": ModelStart,
    "data": DataConfig,
    "noise": NoiseConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
    "lora": LoraConfig,
    "heads": HeadsConfig,
}
