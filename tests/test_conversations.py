"""Conversations to tokens: an example has the ids of the whole conversation, its prompts those that decoding gives."""

import json

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from test_cli import write_rows
from test_gguf import byte_fallback
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from msn_jax import data
from msn_jax.config import DataConfig, DataSource
from msn_jax.errors import InputError
from msn_jax.io.tokenizer import encode_chat
from msn_jax.rows import Unusable, read_rows, to_messages, tools_of

CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATES = {
    "llama2": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
}
WITH_TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.tool_call_id %} to {{ m.tool_call_id }}{% endif %}{{ '\n' }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}({{ c.function.arguments | tojson }})</call>{% endfor %}"
    "{{ m.content or '' }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of a reply that was said before, the thoughts are left out (Qwen3).
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def sentencepiece(kind, strips=False):
    """legacy: a space before each piece of text between special tokens (Llama 2); first: one before the whole text
    (Mistral v0.3); never: none. strips: the end token swallows the spaces behind it (Phi-3)."""
    words = [*"Hello there friend what is prime fine thanks".split(), "\n\n"]
    pieces = [f"<0x{b:02X}>" for b in range(256)] + ["▁", "▁▁", *map(chr, range(33, 127)), "\n"]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *pieces])}
    merges = [("▁", "▁")]
    for word in words:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            vocab.setdefault(word[: end + 1], len(vocab))
        merges.append(("▁", word))
        vocab.setdefault("▁" + word, len(vocab))
    merges = list(dict.fromkeys(merges))
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "legacy":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=kind, split=False)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(t, special=True, normalized=False, rstrip=strips and t == "</s>") for t in list(vocab)[:3]]
    bpe.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def messages(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def starts(response):
    return np.flatnonzero(np.diff(response.astype(int)) == 1) + 1


def chatml(template):
    tokenizer = data.train_tokenizer([], 259)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("template", [*TEMPLATES, "plain"])
@pytest.mark.parametrize("kind", ["legacy", "first", "never"])
def test_an_example_has_the_tokens_of_the_whole_conversation(kind, template, strips):
    tokenizer = sentencepiece(kind, strips)
    tokenizer.chat_template = TEMPLATES.get(template)
    if template == "plain":
        data.apply_template(tokenizer, "plain")
    said = messages("what is a prime", "Hello there", "friend", "  fine thanks")
    whole = tokenizer.apply_chat_template(said, return_dict=False)
    whole = whole[: len(whole) - whole[::-1].index(2)]
    ids, response = data.encode_example(tokenizer, said, {2})
    assert ids.tolist() == whole
    assert len(starts(response)) == 2
    for start, n in zip(starts(response), (1, 3), strict=True):
        assert ids[:start].tolist() == encode_chat(tokenizer, said[:n])
    replies = np.split(ids, np.flatnonzero(np.diff(response)) + 1)[1::2]
    assert all(reply[-1] == 2 and 2 not in reply[:-1] for reply in replies)
    assert [tokenizer.decode(reply[:-1]).strip() for reply in replies] == ["Hello there", "fine thanks"]


def test_a_token_across_the_border_belongs_to_the_reply():
    tokenizer = sentencepiece("never")
    tokenizer.chat_template = TEMPLATES["zephyr"]
    ids, response = data.encode_example(tokenizer, messages("what", "\nfine"), {2})
    assert tokenizer.convert_ids_to_tokens(ids[response]) == ["\n\n", "fine", "</s>"]
    assert ids.tolist() == tokenizer.apply_chat_template(messages("what", "\nfine"), return_dict=False)[:-1]
    # A special token before a reply swallows the space that the reply begins with: it is not a part of the reply.
    tokenizer = sentencepiece("never", strips=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    ids, response = data.encode_example(tokenizer, messages("what", " fine"), {2})
    assert tokenizer.convert_ids_to_tokens(ids[response]) == ["fine", "</s>"]


# Tools, their calls, and thoughts.


def test_calls_of_tools_and_thoughts_are_learnt():
    tokenizer = chatml(WITH_TOOLS)
    said = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "tool", "content": "2", "tool_call_id": "x7"},
        {"role": "assistant", "content": "2.", "reasoning_content": "easy"},
    ]
    as_lists = {"messages": said, "tools": TOOLS}
    as_text = {"messages": [m | {"tool_calls": json.dumps(CALL)} if "tool_calls" in m else m for m in said]}
    for row in (as_lists, as_text | {"tools": json.dumps(TOOLS)}):
        made, tools = to_messages(row), tools_of(row)
        assert (made, tools) == (said, TOOLS)
        ids, response = data.encode_example(tokenizer, made, None, tools)
        text = tokenizer.decode(ids)
        assert text.startswith(f"<tools>{json.dumps(TOOLS)}</tools><|im_start|>user") and "tool to x7\n2" in text
        assert tokenizer.decode(ids[response]) == '<call>add({"a": 1})</call><|im_end|><think>easy</think>2.<|im_end|>'
        for start, n in zip(starts(response), (1, 3), strict=True):
            assert ids[:start].tolist() == encode_chat(tokenizer, said[:n], TOOLS)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"tools": "[{"}, "tools are no list"),
        ({"tools": {"name": "add"}}, "tools are no list"),
        ({"tools": ["add"]}, "tools are no list"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": "[{"}]},
            "tool_calls are no",
        ),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": []}]}, "no response"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "reasoning": "\ud800"}]}, "not text"),
    ],
)
def test_rows_of_tools_that_cannot_be_used_are_counted(change, reason):
    row = {"messages": messages("a", "b"), **change}
    with pytest.raises(Unusable, match=reason):
        to_messages(row), tools_of(row)


def test_what_a_template_leaves_out_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    thinks = [messages("a")[0], {"role": "assistant", "content": "b", "reasoning_content": "hm"}]
    calls = [messages("a")[0], {"role": "assistant", "content": "b", "tool_calls": CALL}]
    rows = [
        {"messages": messages("a", "b")},
        {"messages": messages("a", "b"), "tools": TOOLS},
        {"messages": calls},
        {"messages": thinks},
    ]
    path = str(write_rows(tmp_path / "a.jsonl", rows))
    config = DataConfig(sources=[DataSource(path=path)], max_tokens=400)
    corpus = data.load_examples(config, chatml(data.CHATML), [2])
    lost = ("tools", "tool_calls", "reasoning_content")
    assert corpus.skipped[path] == {f"template leaves out {key}": 1 for key in lost} and len(corpus.train[path]) == 1
    corpus = data.load_examples(config, chatml(WITH_TOOLS), [2])
    assert corpus.skipped[path] == {} and len(corpus.train[path]) == 4


def test_keys_that_a_column_store_fills_in_are_not_there(tmp_path):
    two = [
        {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}},
        {"name": "now", "parameters": {"properties": {"zone": {"type": "string"}}}},
    ]
    rows = [{"messages": messages("a", "b"), "tools": [tool]} for tool in two]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = list(read_rows(DataSource(path=str(tmp_path / "a.parquet"))))
    assert [tools_of(row) for row in read] == [[tool] for tool in two]


# Templates that show earlier turns otherwise than they were said.


def test_the_last_turn_is_learnt_where_a_template_forgets_thoughts(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer, said = chatml(FORGETS), messages("a", "b", "c", "d")
    ids, response = data.encode_example(tokenizer, said)
    assert tokenizer.decode(ids[response]) == "<think></think>d<|im_end|>"
    assert ids[: starts(response)[0]].tolist() == encode_chat(tokenizer, said[:3])
    path = str(write_rows(tmp_path / "a.jsonl", [{"messages": said}, {"messages": said[:2]}]))
    corpus = data.load_examples(DataConfig(sources=[DataSource(path=path)], max_tokens=99), tokenizer, [2])
    assert corpus.skipped[path] == {data.LAST_ALONE: 1} and len(corpus.train[path]) == 2


def test_a_generation_prompt_that_begins_no_reply_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for said in (messages("a", "b"), messages("a", "b", "c", "d")):
        with pytest.raises(Unusable, match="generation prompt is no beginning of the reply"):
            data.encode_example(chatml(THINKS), said)
    path = str(write_rows(tmp_path / "a.jsonl", [{"messages": messages("a", "b")}] * 3))
    config = DataConfig(sources=[DataSource(path=path)], max_tokens=99)
    named = (
        r"none of its 3 rows .*generation prompt is no beginning of the reply: 3\); accepted: another data.chat_templ"
    )
    with pytest.raises(InputError, match=named):
        data.load_examples(config, chatml(THINKS), [2])


@pytest.mark.parametrize("template", [*TEMPLATES, "plain"])
@pytest.mark.parametrize("prefix", [True, False])
def test_the_same_of_vocabularies_from_gguf(template, prefix):
    tokenizer, stops = byte_fallback(**{"ggml.bos_token_id": 1, "ggml.add_space_prefix": prefix})
    tokenizer.chat_template = TEMPLATES.get(template)
    if template == "plain":
        data.apply_template(tokenizer, "plain")
    said = messages("what is a prime", "Hello there", "friend", "fine thanks")
    whole = tokenizer.apply_chat_template(said, return_dict=False)
    ids, response = data.encode_example(tokenizer, said, stops)
    assert ids.tolist() == whole[: len(ids)] and 2 not in whole[len(ids) :] and ids[-1] == 2
    for start, n in zip(starts(response), (1, 3), strict=True):
        assert ids[:start].tolist() == encode_chat(tokenizer, said[:n])
