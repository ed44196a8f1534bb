"""Every setting of a run, as frozen dataclasses. No arrays, no jax."""

from __future__ import annotations

import dataclasses
from typing import Any

from msn_jax.errors import InputError, check_fields
from msn_jax.shapes import SHAPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How to generate. All but `method`, `tree` and `batch_size` are traced: changing them compiles nothing."""

    method: str = "tr-jacobi"
    tree: str | None = None  # None: the measured default of the backend, see decode.tree.tree_set
    max_new_tokens: int = 256
    batch_size: int = 1
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_fields(
            self,
            "",
            max_new_tokens=(self.max_new_tokens >= 1, "1 or more"),
            batch_size=(self.batch_size >= 1, "1 or more"),
            temperature=(0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            top_k=(0 <= self.top_k < 2**31, "0 (all tokens) or more"),
            top_p=(0 < self.top_p <= 1, "a number above 0 and up to 1"),
            seed=(0 <= self.seed < 2**32, "0 to 2**32 - 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Noise of the training inputs (Make Some Noise, section 3.1). Static under jit."""

    kind: str = "ahead"  # ahead: tokens before it in its example; random: the whole vocabulary; none: plain tuning
    length: int = 5  # L: tokens of a noise segment
    segments: int = 1  # an example, as in the paper
    density: float = 0.0  # above 0, instead of `segments`: the share of response tokens under noise
    progressive_steps: int = 0  # above 0: L grows from 1 to `length` over so many steps
    layout: str = "inline"  # inline: in the text, as in the paper; beside: in chains under anchors of a clean text
    mark: bool = False  # a learned embedding for each depth in place of a token's, so that noise is told from text
    anchors: int = 32  # of `beside` and of lora.draft_only, instead of segments: places a row that noise hangs under
    weight: float = 0.5  # of `beside`: what the noise's mean loss counts against that of the clean text
    target: str = "label"  # of `beside`: label; model: the clean text's own prediction at that place
    loss: str = "kl"  # against a prediction: kl; l1: 0.1 cross entropy + 0.9 L1; overlap: -log of the common mass
    decay: float = 1.0  # of hung noise: what the loss counts from one depth to the next
    vocab_size: int = 0  # of `random`; make_train_step fills in the model's

    def __post_init__(self):
        check_fields(
            self,
            "noise.",
            kind=(self.kind in ("ahead", "random", "none"), "ahead, random, none"),
            length=(self.length >= 1, "1 or more"),
            segments=(self.segments >= 1, "1 or more"),
            density=(0 <= self.density <= 0.9, "0 to 0.9"),
            progressive_steps=(self.progressive_steps >= 0, "0 or more"),
            layout=(
                self.layout == "inline" or (self.layout == "beside" and self.kind != "none"),
                "inline, or beside with a noise.kind that is not none",
            ),
            mark=(not self.mark or self.kind != "none", "true with a noise.kind that is not none"),
            anchors=(self.anchors >= 1, "1 or more"),
            weight=(0 <= self.weight < float("inf"), "0 or more"),
            target=(self.target in ("label", "model"), "label, model"),
            loss=(self.loss in ("kl", "l1", "overlap"), "kl, l1, overlap"),
            decay=(0 < self.decay <= 1, "a number above 0 and up to 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSource:
    """Rows to train on."""

    path: str  # a .jsonl, .jsonl.gz or .parquet file, a hub id (org/name or org/name:subset), or stdlib
    weight: float = 1.0  # how often its examples are drawn, against the other sources
    split: str = "train"  # of a hub id

    def __post_init__(self):
        check_fields(self, "data.sources.", weight=(self.weight > 0, "a positive number"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and how rows become batches."""

    sources: list[DataSource] = dataclasses.field(default_factory=list)
    max_tokens: int = 2048  # T: tokens of a packed row; longer examples are skipped
    packing_bins: int = 64  # rows filled side by side: more of them waste less, and mix epochs further
    held_out: int = 0  # examples of each source kept for evaluation
    chat_template: str | None = None  # None: the tokenizer's; plain; or a .jinja file

    def __post_init__(self):
        check_fields(
            self,
            "data.",
            sources=(len(self.sources) > 0, "a list with at least one {path: ...}"),
            max_tokens=(self.max_tokens >= 8, "8 or more"),
            packing_bins=(self.packing_bins >= 1, "1 or more"),
            held_out=(self.held_out >= 0, "0 or more"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelStart:
    """What to fine-tune, or the shape of a model to train from random weights."""

    ckpt: str | None = None  # whatever --ckpt of decode.py takes
    shape: str | None = None  # a name in SHAPES: what --plan plans, and what `ckpt` must have
    scratch: dict[str, Any] | None = None  # instead of `ckpt`: fields of ModelConfig; a tokenizer of that
    # vocabulary is trained on the data

    def __post_init__(self):
        check_fields(
            self,
            "model.",
            ckpt=((self.ckpt is None) != (self.scratch is None), "one of model.ckpt and model.scratch"),
            shape=(self.shape is None or self.shape in SHAPES, f"null, {', '.join(SHAPES)}"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation and what it writes."""

    out: str  # run directory, local or gs://
    steps: int
    batch_size: int = 8  # packed rows a step, over all devices
    accumulate: int = 1  # parts that a batch is split into, one after the other
    learning_rate: float = 2e-5
    warmup_steps: int = 0
    final_learning_rate: float = 0.1  # where the cosine ends, as a share of learning_rate
    weight_decay: float = 0.0
    beta2: float = 0.95
    clip_norm: float = 1.0
    dtype: str = "float32"  # of matrix products; weights and optimiser state are float32
    activation_dtype: str | None = None  # of what stands between products; null: as dtype. On CPU take float32
    remat: str = "full"  # full: keep each layer's input; dots: its matrix products too; none: everything
    head_chunk: int = 128  # tokens of a row whose logits exist at one time
    seed: int = 0
    save_every: int = 500  # steps; the last step is always saved
    keep: int = 2  # last checkpoints kept, beside the best
    eval_every: int = 0  # steps; 0 never. Needs data.held_out
    eval_batches: int = 8

    def __post_init__(self):
        check_fields(
            self,
            "train.",
            out=(bool(self.out.strip()), "a directory"),
            steps=(self.steps >= 1, "1 or more"),
            batch_size=(self.batch_size >= 1, "1 or more"),
            accumulate=(
                self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
                f"a divisor of train.batch_size {self.batch_size}",
            ),
            learning_rate=(0 < self.learning_rate < 1, "a number between 0 and 1"),
            warmup_steps=(0 <= self.warmup_steps < self.steps, "0 or more, below train.steps"),
            final_learning_rate=(0 <= self.final_learning_rate <= 1, "0 to 1"),
            weight_decay=(0 <= self.weight_decay < 1, "0 or more, below 1"),
            beta2=(0 < self.beta2 < 1, "a number between 0 and 1"),
            clip_norm=(self.clip_norm > 0, "a positive number"),
            dtype=(self.dtype in ("float32", "bfloat16"), "float32, bfloat16"),
            activation_dtype=(self.activation_dtype in (None, "float32", self.dtype), f"null, float32, {self.dtype}"),
            remat=(self.remat in ("full", "dots", "none"), "full, dots, none"),
            head_chunk=(self.head_chunk >= 1, "1 or more"),
            seed=(0 <= self.seed < 2**32, "0 to 2**32 - 1"),
            save_every=(self.save_every >= 1, "1 or more"),
            keep=(self.keep >= 1, "1 or more"),
            eval_every=(self.eval_every >= 0, "0 (never) or more"),
            eval_batches=(self.eval_batches >= 1, "1 or more"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are laid out. -1: all that the other axes leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    topology: str | None = None  # the TPU slice that the config is meant for, such as v5p:2x2x2
    distributed: bool = False  # several processes: jax.distributed finds the others, as on a pod

    def __post_init__(self):
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

    rank: int = 0  # 0: tune all weights
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank
    targets: list[str] = dataclasses.field(default_factory=lambda: list(LINEAR_MAPS))
    draft_only: bool = False  # act at noise positions alone, and learn the frozen model's own predictions
    store: str | None = None  # dtype of its file: float32, float16, int8; null: float16 if draft_only, else float32

    def __post_init__(self):
        check_fields(
            self,
            "lora.",
            draft_only=(not self.draft_only or self.rank > 0, "true with lora.rank above 0"),
            rank=(self.rank >= 0, "0 (tune all weights) or more"),
            alpha=(self.alpha > 0, "a positive number"),
            targets=(bool(self.targets) and set(self.targets) <= set(LINEAR_MAPS), f"some of {list(LINEAR_MAPS)}"),
            store=(self.store in (None, "float32", "float16", "int8"), "null, float32, float16, int8"),
        )

    @property
    def stored_dtype(self) -> str:
        # What a draft-only adapter drafts is verified, and half the room is enough.
        return self.store or ("float16" if self.draft_only else "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything of a training run: the sections of a file in configs/."""

    model: ModelStart
    data: DataConfig
    noise: NoiseConfig = dataclasses.field(default_factory=NoiseConfig)
    train: TrainConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def __post_init__(self):
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
        return "draft_only" if self.lora.draft_only else self.noise.layout

    @classmethod
    def from_dict(cls, sections: dict[str, Any]) -> RunConfig:
        """The inverse of dataclasses.asdict."""
        made = {name: kind(**sections[name]) for name, kind in SECTIONS.items() if name != "data"}
        sources = [DataSource(**source) for source in sections["data"]["sources"]]
        return cls(data=DataConfig(**{**sections["data"], "sources": sources}), **made)


SECTIONS = {
    "model": ModelStart,
    "data": DataConfig,
    "noise": NoiseConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
    "lora": LoraConfig,
}
