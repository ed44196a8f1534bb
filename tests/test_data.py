"""Conversations to batches: masks, skipped rows, packing, resume. A byte is a token, so masks can be written out."""

import gzip
import itertools
import json
import os

import datasets
import numpy as np
import pytest
from test_cli import write_rows
from test_rows import CONVERSATION, messages
from tokenizers import processors

from msn_jax import InputError, data
from msn_jax.config import DataConfig, DataSource
from msn_jax.conversations import PLAIN
from msn_jax.io.tokenizer import encode_chat, from_folder
from msn_jax.rows import Unusable, to_messages

NAMES = ("tokens", "segment_ids", "positions", "response")
END = 2  # <|im_end|> of a trained tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bytewise():
    """A token for each byte, and three special ones."""
    return data.train_tokenizer([], 259)


def config(*paths, **settings):
    sources = [p if isinstance(p, DataSource) else DataSource(path=str(p)) for p in paths]
    return DataConfig(sources=sources, **{"max_tokens": 64, "packing_bins": 4, **settings})


def corpus(weights=None, **lengths):
    """Sources of examples with the given lengths. A token's value is its example's number; the last half is reply."""
    numbers = itertools.count(1)
    make = lambda n: {"tokens": np.full(n, next(numbers), np.int32), "response": np.arange(n) >= n // 2}
    train = {name: data.Examples.join(map(make, ns)) for name, ns in lengths.items()}
    none = {name: data.Examples.join([]) for name in train}
    return data.Corpus(train=train, held_out=none, skipped={}, weights=weights or dict.fromkeys(train, 1.0))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


# Tokens and mask


def test_the_mask_covers_each_reply_to_its_end_token(bytewise):
    tokens, response = data.encode_example(bytewise, messages(*CONVERSATION))
    assert bytewise.decode(tokens) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>"
        "\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\nok!<|im_end|>"
    )
    # start, user\n, hi, end, \n, start, assistant\n = 1 + 5 + 2 + 1 + 1 + 1 + 10; the \n after a reply is no reply
    assert response.astype(int).tolist() == [0] * 21 + [1] * 3 + [0] * 22 + [1] * 4
    assert (tokens[23], tokens[-1]) == (END, END)
    assert (tokens.dtype, response.dtype) == (np.int32, bool)


def test_what_follows_the_last_reply_is_left_out(bytewise):
    whole, _ = data.encode_example(bytewise, messages(*CONVERSATION[:2]))
    tokens, _ = data.encode_example(bytewise, messages(*CONVERSATION[:3]))
    np.testing.assert_array_equal(tokens, whole)


def test_a_reply_ends_at_its_first_stop_token(bytewise):
    said = messages(("user", "hi"), ("assistant", "a<|endoftext|>b"))
    tokens, response = data.encode_example(bytewise, said, stop_ids=(0, END, 999))
    assert bytewise.decode(tokens[response]) == "a<|endoftext|>"
    tokens, response = data.encode_example(bytewise, said, stop_ids=(END,))
    assert bytewise.decode(tokens[response]) == "a<|endoftext|>b<|im_end|>"


def test_the_prompt_has_the_tokens_that_decoding_gives_it(smollm2_text):
    said = messages(("system", "Be brief."), *((role, text * 3 + " \n") for role, text in CONVERSATION))
    tokens, response = data.encode_example(smollm2_text.tokenizer, said, smollm2_text.stop_ids)
    starts = np.flatnonzero(np.diff(response.astype(int)) == 1) + 1
    assert len(starts) == 2
    for start, turn in zip(starts, (2, 4), strict=True):
        assert tokens[:start].tolist() == encode_chat(smollm2_text.tokenizer, said[:turn])
    whole = smollm2_text.tokenizer.apply_chat_template(said, tokenize=False)
    assert smollm2_text.tokenizer.decode(tokens) + "\n" == whole


def test_plain_template(bytewise):
    tokens, response = data.encode_example(data.apply_template(bytewise, "plain"), messages(*CONVERSATION))
    assert bytewise.decode(tokens) == "hi\nyo<|im_end|>\nso\nok!<|im_end|>"
    assert response.astype(int).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    bytewise.bos_token = "<|im_start|>"  # part of a text only where the tokenizer itself puts it there
    assert data.apply_template(bytewise, "plain").chat_template[:20] == PLAIN[:20]
    start = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    bytewise.backend_tokenizer.post_processor = start
    tokens, _ = data.encode_example(data.apply_template(bytewise, "plain"), messages(*CONVERSATION[:2]))
    assert bytewise.decode(tokens) == "<|im_start|>hi\nyo<|im_end|>"


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('no') }}", "template refuses"),
        ("{{ messages[1].content.x.y }}", "template refuses"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "rewrites"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no stop token"),
    ],
)
def test_a_template_that_cannot_mark_replies_gives_a_reason(bytewise, template, reason):
    bytewise.chat_template = template
    with pytest.raises(Unusable, match=reason):
        data.encode_example(bytewise, messages(*CONVERSATION))


def test_templates_that_cannot_be_used_are_refused(bytewise, tmp_path):
    bad, empty = tmp_path / "bad.jinja", tmp_path / "empty.jinja"
    bad.write_text("\n{% for m in %}")
    empty.write_text(" ")
    refused = [
        (str(bad), "bad.jinja, line 2"),
        (str(empty), "empty"),
        (str(tmp_path / "none.jinja"), "none.jinja cannot be read"),
        ("chatml", "accepted: null, plain, a .jinja file"),
    ]
    for setting, words in refused:
        with pytest.raises(InputError, match=words):
            data.apply_template(bytewise, setting)
    bytewise.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        data.apply_template(bytewise, None)
    bytewise.eos_token = None
    with pytest.raises(InputError, match="end token"):
        data.apply_template(bytewise, "plain")
    good = tmp_path / "good.jinja"
    good.write_text(data.CHATML)
    assert data.apply_template(bytewise, str(good)).chat_template == data.CHATML


# Sources


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("missing.jsonl", None, "missing"),
        ("folder", ..., "directory"),
        ("notes.txt", b"hello", "known kind"),
        ("empty.jsonl", b"", "no rows"),
        ("blank.jsonl", b"\n\n", "no rows"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "no rows"),
        ("short.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 999, mtime=0)[:40], "cannot be read"),
        ("fake.jsonl.gz", b'{"prompt": "a"}', "cannot be read"),
        ("latin.jsonl", b'{"prompt": "\xe9"}', "cannot be read"),
        ("bad.jsonl", b'{"prompt": "a", "completion": "b"}\n\n{"prompt": \n', "bad.jsonl, line 3: not valid JSON"),
        ("list.jsonl", b'{"prompt": "a", "completion": "b"}\n[1]\n', "line 2: a list; accepted: a JSON object"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("bad.parquet", b"hello", "cannot be read"),
        ("noreply.jsonl", b'{"prompt": "a"}\n{"prompt": ""}\n', r"none of its 2 rows can be used \(no response: 2\)"),
    ],
)
def test_a_bad_file_gives_one_line(bytewise, tmp_path, capfd, name, content, words):
    path = tmp_path / name
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words) as e:
        data.load_examples(config(path), bytewise, [END])
    assert name in str(e.value) and "\n" not in str(e.value)
    assert capfd.readouterr() == ("", "")


def test_a_cache_that_cannot_be_written_gives_one_line(bytewise, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(path / "cache"))
    with pytest.raises(InputError, match="cache of encoded rows cannot be written"):
        data.load_examples(config(path), bytewise, [END])


# The tokenizer of a model from scratch


def test_a_trained_tokenizer_survives_its_folder(tmp_path):
    rows = [{"prompt": f"def f{i}(x):", "completion": f"    return x + {i}\n"} for i in range(50)] + [{"odd": 1}]
    tokenizer = data.train_tokenizer(rows, 280)
    assert len(tokenizer) == 280
    assert tokenizer.backend_tokenizer.to_str() == data.train_tokenizer(rows, 280).backend_tokenizer.to_str()
    tokenizer.save_pretrained(tmp_path)
    back, stops = from_folder(tmp_path)
    assert stops == {0, END} == set(back.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    assert back.eos_token_id == END and back.pad_token_id == 0
    text = "def f3(x):\n    return 'naïve 雪'  # <|im_end|>"
    assert back.encode(text) == tokenizer.encode(text) and back.decode(back.encode(text)) == text
    assert len(back.encode(text)) < len(text.encode())
    said = messages(*CONVERSATION)
    assert encode_chat(back, said) == encode_chat(tokenizer, said)
    with pytest.raises(InputError, match="258 is not possible; accepted: 259 or more"):
        data.train_tokenizer(rows, 258)


# The corpus


def numbered(path, count, prefix=""):
    return write_rows(path, [{"prompt": f"{prefix}{i}", "completion": "ok"} for i in range(count)])


def test_skipped_rows_are_counted_by_reason(bytewise, tmp_path):
    rows = [{"prompt": "hi", "completion": "yo"}, {"prompt": "hi"}, {"prompt": "a" * 99, "completion": "b"}, {"x": 1}]
    path = write_rows(tmp_path / "a.jsonl", rows + [{"prompt": "so", "completion": "!"}, {"question": ""}])
    corpus = data.load_examples(config(path, max_tokens=24), bytewise, [END])
    assert corpus.skipped == {str(path): {"no response": 2, "longer than max_tokens": 1, "unknown keys": 1}}
    assert corpus.counts == {str(path): {"train": 2, "held_out": 0}}
    assert (corpus.tokens, corpus.response_tokens) == (24 + 23, 3 + 2)  # 21 of a prompt with two letters
    assert data.longest_response(corpus) == 3
    np.testing.assert_array_equal(
        corpus.train[str(path)][1]["tokens"],
        data.encode_example(bytewise, to_messages(rows[0] | {"prompt": "so", "completion": "!"}))[0],
    )


def test_encoded_rows_are_read_again_only_after_a_change(bytewise, tmp_path, monkeypatch):
    path = numbered(tmp_path / "a.jsonl", 12)
    first = data.load_examples(config(path), bytewise, [END])
    with monkeypatch.context() as patch:
        patch.setattr(data, "encode_example", None)  # a cached source needs no encoding
        again = data.load_examples(config(path), bytewise, [END])
    np.testing.assert_array_equal(first.train[str(path)].tokens, again.train[str(path)].tokens)
    shorter = data.load_examples(config(path, max_tokens=23), bytewise, [END])
    assert shorter.skipped == {str(path): {"longer than max_tokens": 2}}  # "10" and "11"
    assert data.load_examples(config(path, chat_template="plain"), bytewise, [END]).tokens == 12 * (2 + 3) + 2
    age = path.stat()
    path.write_text(path.read_text().replace("ok", "no"))
    os.utime(path, ns=(age.st_atime_ns, age.st_mtime_ns))
    changed = data.load_examples(config(path), bytewise, [END])
    assert not np.array_equal(changed.train[str(path)].tokens, first.train[str(path)].tokens)


def test_held_out_examples_are_never_trained_on(bytewise, tmp_path):
    one, two = numbered(tmp_path / "one.jsonl", 20), numbered(tmp_path / "two.jsonl", 30)  # 20 rows are in both
    corpus = data.load_examples(config(one, two, held_out=5), bytewise, [END])
    texts = lambda part: [bytewise.decode(e[i]["tokens"]) for e in part.values() for i in range(len(e))]
    held, train = texts(corpus.held_out), texts(corpus.train)
    assert len(held) == 10 and not set(held) & set(train)
    assert set(held) | set(train) == set(texts(data.load_examples(config(two), bytewise, [END]).train))
    dropped = sum(reasons.get("copy of a held-out row", 0) for reasons in corpus.skipped.values())
    assert dropped == 20 + 30 - 10 - len(train) > 0
    again = data.load_examples(config(one, two, held_out=5), bytewise, [END])
    assert texts(again.held_out) == held
    with pytest.raises(InputError, match="20 usable rows are too few for data.held_out = 20"):
        data.load_examples(config(two, one, held_out=20), bytewise, [END])
    with pytest.raises(InputError, match="lists .*one.jsonl twice"):
        data.load_examples(config(one, one), bytewise, [END])


def test_longest_response_is_of_one_turn():
    example = lambda mask: {"tokens": np.zeros(len(mask), np.int32), "response": np.array(mask, bool)}
    examples = data.Examples.join([example([0, 1, 1, 0, 1]), example([0, 0, 1, 1, 1]), example([0, 1])])
    other = data.Examples.join([example([0, 1, 1])])
    corpus = data.Corpus(train={"a": examples, "b": other}, held_out={}, skipped={}, weights={})
    assert data.longest_response(corpus) == 3


# Batches


def test_packing_keeps_examples_apart():
    corpus_ = corpus(a=[5, 3, 4, 6, 2, 7, 2] * 3)
    for batch in take(data.batches(corpus_, config("x", max_tokens=10), 3, seed=0), 4):
        assert {name: (x.dtype, x.shape) for name, x in batch.items()} == {
            "tokens": (np.int32, (3, 10)),
            "segment_ids": (np.int32, (3, 10)),
            "positions": (np.int32, (3, 10)),
            "response": (bool, (3, 10)),
        }
        for tokens, segments, positions, response in zip(*(batch[name] for name in NAMES), strict=True):
            runs = [(k, len(list(run))) for k, run in itertools.groupby(segments)]
            used = [k for k, _ in runs if k]
            assert used == list(range(1, len(used) + 1)) and [k for k, _ in runs][len(used) :] in ([], [0])
            at = 0
            for k, n in runs:
                part, at = slice(at, at + n), at + n
                if k:
                    assert n == len(corpus_.train["a"][tokens[part][0] - 1]["tokens"])
                    assert len(set(tokens[part])) == 1
                    assert positions[part].tolist() == list(range(n))
                    assert response[part].tolist() == [i >= n // 2 for i in range(n)]
                else:
                    assert not tokens[part].any() and not response[part].any() and not positions[part].any()


def test_each_epoch_has_every_example_once_in_a_new_order():
    # One bin: more of them would be shuffled too, whatever the order of the examples.
    iterator = data.batches(corpus(a=[8] * 12), config("x", max_tokens=8, packing_bins=1), 4, seed=3)
    epochs = [np.concatenate([batch["tokens"][:, 0] for batch in take(iterator, 3)]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1, 13))
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    other = data.batches(corpus(a=[8] * 12), config("x", max_tokens=8, packing_bins=1), 4, seed=4)
    assert np.concatenate([batch["tokens"][:, 0] for batch in take(other, 3)]).tolist() != epochs[0]


def test_sources_are_drawn_by_weight():
    corpus_ = corpus(weights={"a": 3.0, "b": 1.0}, a=[8] * 20, b=[8] * 50)
    rows = take(data.batches(corpus_, config("x", max_tokens=8), 8, seed=0), 25)
    share = np.mean([(batch["tokens"][:, 0] <= 20).mean() for batch in rows])
    assert abs(share - 0.75) < 0.02


@pytest.mark.parametrize("after", [0, 1, 2, 7])
def test_resume_gives_the_batches_of_an_uninterrupted_run(after):
    """A packing round is 7 rows, a batch 4, an epoch about 5 batches: states lie within all of them."""
    corpus_ = corpus(weights={"a": 2.0, "b": 1.0}, a=[5, 3, 4, 6, 2, 7, 9] * 4, b=[2, 2, 3, 8, 10, 4] * 3)
    start = lambda: data.batches(corpus_, config("x", max_tokens=10, packing_bins=7), 4, seed=1)
    expected = take(start(), after + 8)
    interrupted = start()
    assert_same(take(interrupted, after), expected[:after])
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = start()
    resumed.set_state(state)
    assert_same(take(resumed, 8), expected[after:])
    take(interrupted, 2)
    interrupted.set_state(state)  # and back in one that went on, with batches fetched ahead
    assert interrupted.get_state() == state
    assert_same(take(interrupted, 8), expected[after:])


def test_held_out_batches_are_fixed_and_filled_up():
    made = corpus(a=[8, 8, 4, 4, 8], b=[8, 3])
    corpus_ = data.Corpus(train={}, held_out=made.train, skipped={}, weights={})
    batches = data.held_out_batches(corpus_, config("x", max_tokens=8), 2, count=9)
    rows = np.concatenate([batch["tokens"] for batch in batches])
    # the sources take turns: 1 (of a), 6 (of b), 2, 7, 3, 4, 5; only 3 fits behind 7
    assert [sorted(set(row) - {0}) for row in rows.tolist()] == [[1], [6], [2], [3, 7], [4], [5]]
    assert [len(batch["tokens"]) for batch in batches] == [2, 2, 2]
    assert_same(batches, data.held_out_batches(corpus_, config("x", max_tokens=8), 2, count=9))
    [four] = data.held_out_batches(corpus_, config("x", max_tokens=8), 4, count=1)
    assert four["segment_ids"].max(axis=1).tolist() == [1, 1, 1, 2]
    fill = data.held_out_batches(corpus_, config("x", max_tokens=8), 4, count=2)[-1]
    assert fill["segment_ids"].max(axis=1).tolist() == [1, 1, 0, 0] and not fill["response"][2:].any()
    with pytest.raises(InputError, match="held_out = 0"):
        data.held_out_batches(made, config("x"), 2, 1)
