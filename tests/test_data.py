"""dsv2.data: tokenizers, corpora, packing, batches and n-gram baselines."""

from __future__ import annotations

import builtins
import gettext
import hashlib
import json
import math
import multiprocessing
import os
import random
import struct
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv2.data.catalogues as catalogues_module
import dsv2.data.code as code_module
import dsv2.data.corpus as corpus_module
import dsv2.data.english as english_module
from dsv2.data import (
    ByteTokenizer,
    Corpus,
    Document,
    HFTokenizer,
    NGramModel,
    PackedDataError,
    PackedDataset,
    arithmetic_documents,
    arithmetic_problems,
    cache_directory,
    find_corpus,
    load_tokenizer,
    nats_per_byte,
    ngram_baselines,
    prepare,
)
from dsv2.data.__main__ import main
from dsv2.data.arithmetic import KINDS
from dsv2.data.code import code_documents
from dsv2.data.documents import cap, drop_duplicates
from dsv2.data.packing import permute


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSV2_CACHE", str(tmp_path / "cache"))


def small_corpus(documents: int = 60, seed: int = 0) -> Corpus:
    """Documents of words, of unequal lengths and two domains, without a scan."""
    rng = random.Random(seed)
    words = "alpha beta gamma delta épsilon zeta eta theta".split()
    made = []
    for number in range(documents):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(5, 90))) + f" {number}\n"
        made.append(Document("code" if number % 3 == 0 else "english", f"document {number}", text))
    made.sort(key=lambda document: document.domain)
    return Corpus(made, {"code": "made up", "english": "made up"})


@pytest.fixture
def dataset(tmp_path) -> PackedDataset:
    return prepare(small_corpus(), ByteTokenizer(), tmp_path / "packed")


# Tokenizers ---------------------------------------------------------------------------------------


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert ids == [256, *text.encode(), 257]
    assert tokenizer.decode(ids, errors="strict") == text


@given(st.lists(st.integers(0, 263), max_size=40))
def test_stream_of_any_ids_equals_decoding_at_once(ids):
    tokenizer = ByteTokenizer()
    for skip in (True, False):
        stream = tokenizer.decode_stream(skip_special=skip)
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=skip)
    # An independent reading: between special tokens, bytes.decode.
    runs, run = [], []
    for token in [*ids, 256]:
        if token < 256:
            run.append(token)
        else:
            runs.append(bytes(run).decode("utf-8", "replace"))
            run = []
    assert tokenizer.decode(ids) == "".join(runs)


@given(st.text(alphabet=st.sampled_from("aé€𝄞ß漢 "), max_size=12))
def test_stream_gives_whole_characters_at_once_and_never_early(text):
    tokenizer = ByteTokenizer()
    stream = tokenizer.decode_stream()
    for character in text:
        *first, last = character.encode()
        assert [stream.push(token) for token in first] == [""] * len(first)
        assert stream.push(last) == character
    assert stream.finish() == ""


def test_stream_cut_inside_a_character_follows_errors():
    tokenizer = ByteTokenizer()
    stream = tokenizer.decode_stream()
    assert [stream.push(token) for token in "é".encode()[:1]] == [""]
    assert stream.finish() == "\ufffd"
    assert stream.push(ord("a")) == "a"  # usable again
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode([0xC3], errors="strict")


def test_special_tokens_typed_by_a_user_stay_text():
    tokenizer = ByteTokenizer()
    text = "<bos>hi<user> <nothing>"
    assert max(tokenizer.encode(text)) < 256
    assert tokenizer.encode(text, allow_special=True) == [256, *b"hi", 259, *b" <nothing>"]
    assert tokenizer.decode([256, 104, 261], skip_special=False) == "<bos>h<end>"
    assert tokenizer.decode([262, 263]) == ""
    assert tokenizer.vocab_size % 8 == 0


def test_byte_tokenizer_refuses_what_is_no_token_and_no_text():
    with pytest.raises(ValueError, match="0..263, got 264"):
        ByteTokenizer().decode([264])
    with pytest.raises(ValueError, match="surrogate"):
        ByteTokenizer().encode("a\ud800")


@pytest.fixture
def hf_directory(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the cat sat on the mat with the hat"] * 5, trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_hf_tokenizer_has_the_same_interface(hf_directory):
    tokenizer = load_tokenizer(hf_directory)
    assert isinstance(tokenizer, HFTokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    text = "the cat 漢 é <s> mat"
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert ids[0] == 0 and ids[-1] == 1 and 0 not in ids[1:-1]
    assert tokenizer.decode(ids) == text
    assert 0 in tokenizer.encode(text, allow_special=True)
    stream = tokenizer.decode_stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)
    with pytest.raises(ValueError, match="token id"):
        tokenizer.decode([tokenizer.vocab_size])


def test_hf_tokenizer_reads_its_config_and_says_what_is_wrong(hf_directory, monkeypatch):
    config = hf_directory / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "</s>"}, "eos_token": "<s>"}))
    tokenizer = load_tokenizer(hf_directory)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)
    config.write_text(json.dumps({"bos_token": "<unknown>"}))
    with pytest.raises(ValueError, match="<unknown>"):
        load_tokenizer(hf_directory)
    config.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_tokenizer(hf_directory)
    (hf_directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer.json"):
        load_tokenizer(hf_directory)
    real = builtins.__import__

    def absent(name, *rest):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        load_tokenizer(hf_directory)


def test_load_tokenizer_falls_back_to_bytes(tmp_path):
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "nowhere")


# Arithmetic ---------------------------------------------------------------------------------------


def test_arithmetic_is_deterministic_correct_and_of_every_kind():
    def first(seed):
        stream = arithmetic_problems(seed)
        return [next(stream) for _ in range(3000)]

    problems = first(1)
    assert problems == first(1) != first(2)
    assert {problem.kind for problem in problems} == set(KINDS)
    for problem in problems:
        if problem.kind in ("addition", "subtraction", "multiplication", "division", "expression"):
            exact = eval(problem.question.removesuffix("="))  # digits and signs of our own making
            assert float(problem.answer.split("=")[-1]) == exact
        elif problem.kind == "carries":
            a, b = problem.question.split(",")[0].split(" + ")
            assert problem.answer.endswith(f"answer {int(a) + int(b)}")
        elif problem.kind == "story":
            for equation in problem.answer.split(", "):
                left, right = equation.split(" = ")
                assert eval(left) == int(right)


def test_arithmetic_validation_problems_are_never_met_in_training():
    keys = {}
    for split in ("train", "validation"):
        stream = arithmetic_problems(5, split)
        keys[split] = set()
        for _ in range(2000):
            problem = next(stream)
            keys[split].add(problem.key)
            if split == "train":
                keys[split].update(step for step in problem.steps)
    assert len(keys["train"]) > 500 and len(keys["validation"]) > 100
    assert not keys["train"] & keys["validation"]


def test_arithmetic_documents_have_the_size_asked_for():
    documents = arithmetic_documents(50_000, seed=3)
    assert documents == arithmetic_documents(50_000, seed=3)
    size = sum(document.size for document in documents)
    assert 50_000 <= size < 60_000  # the last sheet of each split may run over
    assert {document.split for document in documents} == {"train", "validation"}


def test_arithmetic_refuses_unknown_requests():
    for wrong in ({"split": "test"}, {"kinds": ("algebra",)}, {"level": 3}, {"kinds": ()}):
        with pytest.raises(ValueError):
            next(arithmetic_problems(**wrong))


# English ------------------------------------------------------------------------------------------


def test_prose_keeps_sentences_and_drops_the_rest():
    text = textwrap.dedent(
        """\
        Return the index of the *first* element that is not smaller than :class:`~pkg.Value`, as
        in the ``bisect`` module.

        Parameters
        ----------
        values : array_like
            The sorted values in which the index is looked up by bisection.
        key (int): the value

        The result can then be used as follows:

        >>> find([1, 2], 2)
        1

        .. code-block:: python

            x = find([1, 2, 3], 2) and the rest of this is code

        .. note:: This is slower than a hash table when the values are not sorted.

        Short one.
        """
    )
    assert english_module.prose(text) == [
        "Return the index of the first element that is not smaller than Value, as in the bisect module.",
        "The sorted values in which the index is looked up by bisection.",
        "This is slower than a hash table when the values are not sorted.",
    ]


def test_docstrings_and_long_comments_are_read_without_importing():
    source = textwrap.dedent(
        '''\
        """Module."""
        raise SystemExit("never run")
        if True:
            def f():
                """Function."""
                # One reason for this is that
                # the other way would be slower
                # in all of the cases.
                class C:
                    """Class."""
        '''
    )
    assert english_module.docstrings(source) == ["Module.", "Function.", "Class."]
    comments = english_module.comment_paragraphs(source)
    assert [" ".join(comment.split()) for comment in comments] == [
        "One reason for this is that the other way would be slower in all of the cases."
    ]
    assert english_module.docstrings("def (") == []


def test_english_and_code_of_one_module_fall_on_the_same_side(tmp_path):
    library = tmp_path / "library"
    for number in range(40):
        path = library / f"package{number % 4}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        sentences = [
            f'"""The {word} number {number} is the one that this is about, and not the {word} before."""\n'
            for word in ("first", "second", "third", "fourth")
        ]
        functions = [f"def f{n}():\n    {text}" for n, text in enumerate(sentences)]
        path.write_text("".join(functions).replace("number {", "n{") + f"x = {number}\n" * 5)
    modules, tests = code_documents(library)
    english = english_module.english_documents(roots=(), library=library)
    english = [document for document in english if document.name.endswith(".py")]
    assert len(modules) == 40 and not tests
    train, validation = Corpus(modules + english).split()
    keys = [
        {document.split_key for document in side if document.name.endswith(".py")}
        for side in (train, validation)
    ]
    assert keys[1] and not keys[0] & keys[1]


def test_code_leaves_out_tables_other_encodings_and_packages(tmp_path):
    good = "def f(value):\n    return value + 1\n\n" * 10
    files = {
        "good.py": good.encode(),
        "site-packages/other.py": good.encode() + b"# other\n",
        "encodings/table.py": good.encode(),
        "latin.py": good.encode() + b"# \xe9\n",
        "table.py": b"x = [" + b"0x1234, 0x5678, \n" * 100 + b"]\n",
        "__pycache__/good.py": good.encode(),
        "short.py": b"x = 1\n",
        "test/test_good.py": good.encode() + b"# a test\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    modules, tests = code_documents(tmp_path)
    assert [document.name for document in modules] == ["good.py"]
    assert [document.name for document in tests] == ["test/test_good.py"]


# The second language ------------------------------------------------------------------------------


def write_catalogue(path, messages: dict[str, str]) -> None:
    """A .mo file of UTF-8 messages, by the format's description in gettext's manual."""
    entries = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **messages}.items())
    originals = b"".join(key.encode() + b"\0" for key, _ in entries)
    translations = b"".join(text.encode() + b"\0" for _, text in entries)
    count = len(entries)
    tables, offset = [], 28 + 16 * count
    for part in (0, 1):
        for entry in entries:
            length = len(entry[part].encode())
            tables.append(struct.pack("<II", length, offset))
            offset += length + 1
    header = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + b"".join(tables) + originals + translations)


@pytest.fixture
def locale(tmp_path, monkeypatch):
    root = tmp_path / "locale"
    monkeypatch.setattr(catalogues_module, "catalogue_roots", lambda: [root] if root.is_dir() else [])
    monkeypatch.setattr(corpus_module, "babel_documents", lambda code, domain: [])
    return root


def german(count: int) -> dict[str, str]:
    return {
        f"message {number}": f"Die Datei mit dem Namen {word} wurde nicht gefunden."
        for number, word in enumerate(f"{a}{b}er" for a in "abcdefghij" for b in "klmnopqrst")
        if number < count
    }


def test_the_language_with_the_most_text_is_taken(locale):
    write_catalogue(locale / "de" / "LC_MESSAGES" / "big.mo", german(90))
    write_catalogue(locale / "fr" / "LC_MESSAGES" / "small.mo", german(20))
    write_catalogue(locale / "ja" / "LC_MESSAGES" / "other.mo", german(100))
    (locale / "de" / "LC_MESSAGES" / "broken.mo").write_bytes(b"\xde\x12\x04\x95 broken")
    corpus = find_corpus(["language"], cache=False, progress=False)
    assert corpus.domain_names == ["german"]
    text = "".join(document.text for document in corpus)
    assert text.count("wurde nicht gefunden.") == 90
    assert find_corpus(["french"], cache=False, progress=False).domain_names == ["french"]


def test_no_second_language_is_said_and_no_error(locale):
    corpus = find_corpus(["arithmetic", "language"], max_bytes_per_domain=5_000, cache=False, progress=False)
    assert corpus.domain_names == ["arithmetic"]
    assert "language: absent" in corpus.describe()


def test_messages_are_cleaned():
    clean = catalogues_module.clean_message
    assert clean("_Ouvrir le fichier sélectionné dans la fenêtre") == [
        "Ouvrir le fichier sélectionné dans la fenêtre."
    ]
    assert clean("Le fichier %s est absent du disque dur.") == []
    assert clean("  -h, --help   afficher cette aide et quitter le programme\n") == []
    assert clean("Fichier") == []
    assert clean("Une phrase sur\n  deux lignes, voilà tout.\n\nlcl_collate est une autre") == [
        "Une phrase sur deux lignes, voilà tout."
    ]


def test_babel_phrases_where_babel_is_installed():
    pytest.importorskip("babel")
    documents = catalogues_module.babel_documents("fr", "french")
    text = "".join(document.text for document in documents)
    assert "lundi 1 janvier 1990" in text and "allemand" in text and "kilomètres" in text


def test_catalogue_reader_agrees_with_gettext(tmp_path):
    path = tmp_path / "x.mo"
    write_catalogue(path, {"yes": "ja", "no": "nein"})
    with path.open("rb") as file:
        assert gettext.GNUTranslations(file).gettext("yes") == "ja"
    assert sorted(catalogues_module.read_catalogue(path)) == ["ja", "nein"]


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_a_damaged_catalogue_is_passed_over(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("mo") / "x.mo"
    path.write_bytes(b"\xde\x12\x04\x95" + content)
    assert isinstance(catalogues_module.read_catalogue(path), list)


# Corpus -------------------------------------------------------------------------------------------


def test_text_files_are_split_and_nothing_is_lost(tmp_path):
    path = tmp_path / "mine.txt"
    text = "\n\n".join(f"Paragraph {number} " + "word " * (number % 300) for number in range(400)) + "\n"
    path.write_text(text, encoding="utf-8")
    corpus = find_corpus(["text"], [path], progress=False)
    assert "".join(document.text for document in corpus) == text
    assert all(document.size < 20_000 for document in corpus) and len(corpus) > 20
    train, validation = corpus.split()
    assert train and validation


@given(st.text(alphabet="ab \n", max_size=300), st.integers(1, 40))
def test_split_text_loses_nothing(text, size):
    assert "".join(corpus_module.split_text(text, size)) == text


def test_text_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        find_corpus(["text"], [tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="latin.txt is not UTF-8"):
        find_corpus(["text"], [tmp_path / "latin.txt"])
    with pytest.raises(ValueError, match="empty.txt holds no text"):
        find_corpus(["text"], [tmp_path / "empty.txt"])
    with pytest.raises(ValueError, match="directory"):
        find_corpus(["text"], [tmp_path])


def test_wrong_requests_are_refused():
    for wrong in (["poetry"], [], ["french", "german"], "code", ["text"]):
        with pytest.raises(ValueError, match="domain"):
            find_corpus(wrong)
    with pytest.raises(ValueError, match="max_bytes_per_domain"):
        find_corpus(["arithmetic"], max_bytes_per_domain=10)


def test_scan_of_this_machine_is_deterministic_capped_and_cached(monkeypatch):
    # A few packages of the standard library stand for all that is installed: the whole scan takes a minute.
    def few(root=None):
        root = root or english_module.standard_library()
        return [
            path
            for name in ("asyncio", "email", "http", "json")
            for path in sorted((root / name).glob("*.py"))
        ]

    monkeypatch.setattr(english_module, "required_distributions", lambda roots=(): [])
    monkeypatch.setattr(english_module, "library_files", few)
    monkeypatch.setattr(code_module, "library_files", few)
    options = {"max_bytes_per_domain": 100_000, "progress": False}
    first = find_corpus(["code", "english", "arithmetic"], **options)
    assert first.domain_names == ["code", "english", "arithmetic"]
    for row in first.table():
        assert 0 < row["bytes"] <= 103_000 and row["share"] <= 0.46  # the last sheet may run over
        assert row["validation_bytes"] > 1_000

    def no_scan(*arguments):
        raise AssertionError("scanned again")

    monkeypatch.setattr(corpus_module, "_scan", no_scan)
    again = find_corpus(["code", "english", "arithmetic"], **options)
    assert again.fingerprint == first.fingerprint and again.notes == first.notes
    monkeypatch.undo()


def test_damaged_corpus_cache_is_made_again():
    first = find_corpus(["arithmetic"], max_bytes_per_domain=5_000)
    (path,) = (cache_directory() / "corpus").glob("*.jsonl")
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    assert find_corpus(["arithmetic"], max_bytes_per_domain=5_000).fingerprint == first.fingerprint
    assert path.read_bytes() != bytes(content)


def test_no_domain_keeps_more_than_its_share():
    documents = [
        Document(domain, f"{domain} {number}", f"{domain} {number} " + "x" * 100)
        for domain, count in (("code", 900), ("english", 60), ("arithmetic", 40))
        for number in range(count)
    ]
    table = Corpus(corpus_module._balance(documents, 0)).table()
    assert max(row["share"] for row in table) <= corpus_module.MAX_SHARE + 1e-3
    assert [row["documents"] for row in table][1:] == [60, 40]


def test_split_is_disjoint_by_content_and_about_two_percent():
    documents = [
        Document("english", f"{n}", f"Sentence number {n} of many. " * (1 + n % 7)) for n in range(3000)
    ]
    documents += [Document("english", f"copy {n}", documents[n].text.replace(" ", "\n")) for n in range(500)]
    train, validation = Corpus(documents).split()
    contents = [{document.content_hash for document in side} for side in (train, validation)]
    assert not contents[0] & contents[1]
    size = sum(document.size for document in validation) / sum(document.size for document in documents)
    assert 0.015 < size < 0.06  # at least 16 KiB, which is more than 2 % here
    shuffled = documents[:]
    random.Random(0).shuffle(shuffled)
    assert {d.content_hash for d in Corpus(shuffled).split()[1]} == contents[1]


def test_duplicates_are_dropped_and_caps_are_deterministic():
    documents = [Document("code", f"{n}", f"text {n % 5}\n") for n in range(20)]
    assert [document.name for document in drop_duplicates(documents)] == ["0", "1", "2", "3", "4"]
    kept = cap(documents, 50, seed=1)
    assert kept == cap(documents, 50, seed=1)
    assert sum(document.size for document in kept) <= 50 < sum(document.size for document in documents)
    assert kept == [document for document in documents if document in kept]


# Packing ------------------------------------------------------------------------------------------


def test_packing_round_trip(tmp_path):
    corpus = small_corpus()
    dataset = prepare(corpus, ByteTokenizer(), tmp_path / "packed")
    tokenizer = ByteTokenizer()
    for side, expected in zip((dataset, dataset.validation), corpus.split()):
        found = [
            (side.document_domain(number), tokenizer.decode(side.document(number)))
            for number in range(side.n_documents)
        ]
        assert found == [(document.domain, document.text) for document in expected]
        assert side.n_tokens == sum(document.size + 2 for document in expected) == len(side.stream())
        assert side.n_text_bytes == sum(document.size for document in expected)
    assert dataset.domain_names == ["code", "english"]
    assert dataset.document(0)[0] == 256 and dataset.document(0)[-1] == 257


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 102_400

        def encode(self, text, bos=False, eos=False, allow_special=False):
            return [100_000, *(70_000 + byte for byte in text.encode()), 100_001]

    dataset = prepare(small_corpus(), Wide(), tmp_path / "packed")
    assert dataset.tokens.dtype == np.uint32
    assert dataset.document(0)[0] == 100_000


def test_batch_is_a_pure_function_of_the_step(dataset):
    there = [dataset.batch(step, 4, 32, seed=7) for step in range(12)]
    again = PackedDataset(dataset.directory, "train")
    for step in (11, 3, 0, 7):
        batch = again.batch(step, 4, 32, seed=7)
        assert torch.equal(batch.tokens, there[step].tokens)
        assert torch.equal(batch.targets, there[step].targets)
        assert torch.equal(batch.domains, there[step].domains)
    assert not torch.equal(again.batch(0, 4, 32, seed=8).tokens, there[0].tokens)
    batch = there[0]
    assert batch.tokens.shape == batch.targets.shape == batch.domains.shape == (4, 32)
    assert (batch.tokens.dtype, batch.targets.dtype, batch.domains.dtype) == (
        torch.int64,
        torch.int64,
        torch.int8,
    )
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])


def test_the_order_is_pinned(tmp_path):
    """A run resumed with other versions of anything must see the same batches, so that the order is fixed."""
    documents = [Document("english", f"{n}", chr(97 + n % 26) * (20 + n)) for n in range(40)]
    dataset = prepare(Corpus(documents), ByteTokenizer(), tmp_path / "pinned")
    rows = torch.cat([dataset.batch(step, 4, 16, seed=3).tokens for step in range(60)])
    assert hashlib.sha256(rows.numpy().astype("<i8").tobytes()).hexdigest()[:16] == "5fd40cd0679c6310"


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_together_see_the_global_batch(dataset, world_size):
    for step in (0, 5, 400):
        whole = dataset.batch(step, 6, 24, seed=1)
        parts = [
            dataset.batch(step, 6, 24, rank=rank, world_size=world_size, seed=1) for rank in range(world_size)
        ]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.domains for part in parts]), whole.domains)


def test_every_window_once_before_the_next_epoch(dataset):
    seq_len = 16
    count = dataset.windows_per_epoch(seq_len)
    assert count == (dataset.n_tokens - 1) // seq_len
    starts = []
    for step in range(2 * count):
        batch = dataset.batch(step, 1, seq_len)
        starts.append((*batch.tokens[0].tolist(), batch.targets[0, -1].item()))
    epochs = [starts[:count], starts[count:]]
    tokens = np.bincount(np.asarray(dataset.stream()), minlength=264)
    for epoch in epochs:
        # Every token but the first and the last few is a target exactly once.
        targets = np.bincount([token for row in epoch for token in row[1:]], minlength=264)
        left_out = tokens - targets
        assert left_out.min() >= 0 and left_out.sum() == dataset.n_tokens - count * seq_len
    assert sorted(epochs[0]) != sorted(epochs[1])  # other documents meet in a window
    # The windows of an epoch, put in order by the token they share, are the joined documents.
    documents, _ = dataset._epoch_order(0, 0)
    joined = np.concatenate([dataset.document(int(number)) for number in documents]).tolist()
    expected = [tuple(joined[place * seq_len : (place + 1) * seq_len + 1]) for place in range(count)]
    assert sorted(expected) == sorted(epochs[0])
    assert expected != epochs[0]


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=40)
def test_permute_is_a_permutation(count, key):
    assert sorted(permute(place, count, key) for place in range(count)) == list(range(count))


def test_permutations_look_random():
    count = 1000
    fixed, rising = 0, 0
    for key in range(20):
        order = [permute(place, count, key * 7919) for place in range(count)]
        fixed += sum(place == value for place, value in enumerate(order))
        rising += sum(a < b for a, b in zip(order, order[1:]))
    # 20 fixed points and half of 19980 steps rising are expected; bounds at about five standard deviations.
    assert fixed < 45 and abs(rising - 9990) < 5 * math.sqrt(20 * count / 12)


def test_domains_label_each_token(dataset):
    by_bytes = {
        name: {bytes(part.document(n).astype(np.uint8)[1:-1]) for n in range(part.n_documents)}
        for name, part in ((name, dataset.take_domain(name)) for name in dataset.domain_names)
    }
    for step in range(10):
        batch = dataset.batch(step, 3, 40)
        for tokens, domains in zip(batch.tokens.tolist(), batch.domains.tolist()):
            place = tokens.index(256) if 256 in tokens else None
            if place is None:
                assert len(set(domains)) == 1
                continue
            end = tokens.index(257, place) if 257 in tokens[place:] else len(tokens)
            assert len(set(domains[place:end])) == 1  # one document, one domain
            run = bytes(tokens[place + 1 : end])
            assert any(text.startswith(run) for text in by_bytes[dataset.domain_names[domains[place]]])


def test_take_domain_and_validation_windows(dataset):
    parts = [dataset.take_domain(name) for name in dataset.domain_names]
    assert sum(part.n_tokens for part in parts) == dataset.n_tokens
    assert sum(part.n_text_bytes for part in parts) == dataset.n_text_bytes
    assert set(parts[1].batch(0, 8, 16).domains.flatten().tolist()) == {1}
    windows = dataset.validation_windows(16, 20)
    assert windows.tokens.shape == (20, 16)
    assert set(windows.domains.flatten().tolist()) == {0, 1}  # spread over both
    assert torch.equal(dataset.validation_windows(16, 20).tokens, windows.tokens)
    everything = dataset.validation_windows(16)
    assert (
        everything.targets.flatten().tolist() == dataset.stream()[1 : 1 + everything.targets.numel()].tolist()
    )
    with pytest.raises(ValueError, match="poetry"):
        dataset.take_domain("poetry")


def test_batch_refuses_what_it_cannot_give(dataset):
    for wrong in (
        {"step": -1},
        {"batch_size": 5, "world_size": 2},
        {"rank": 2, "world_size": 2},
        {"batch_size": 0},
        {"seq_len": 0},
        {"seq_len": 10**6},
    ):
        with pytest.raises(ValueError):
            dataset.batch(**{"step": 0, "batch_size": 4, "seq_len": 8, **wrong})


def test_prepared_data_is_reused_and_remade_when_the_text_changes(tmp_path):
    directory = tmp_path / "packed"
    prepare(small_corpus(), directory=directory)
    before = (directory / "train.bin").stat().st_mtime_ns
    assert prepare(small_corpus(), directory=directory).n_documents
    assert (directory / "train.bin").stat().st_mtime_ns == before
    changed = prepare(small_corpus(seed=1), directory=directory)
    assert changed.manifest["fingerprint"] == PackedDataset(directory).manifest["fingerprint"]
    assert (directory / "train.bin").stat().st_mtime_ns != before
    assert [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name] == []
    default = prepare(small_corpus())
    assert cache_directory() in default.directory.parents


def test_an_interrupted_preparation_leaves_nothing_half_made(tmp_path, monkeypatch):
    directory = tmp_path / "packed"

    class Interrupted(ByteTokenizer):
        left = 20

        def encode(self, *arguments, **options):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().encode(*arguments, **options)

    with pytest.raises(KeyboardInterrupt):
        prepare(small_corpus(), Interrupted(), directory)
    assert list(tmp_path.iterdir()) == []
    stale = tmp_path / ".packed.tmp-killed"  # what SIGKILL leaves
    stale.mkdir()
    os.utime(stale, (0, 0))
    assert prepare(small_corpus(), ByteTokenizer(), directory).n_tokens
    assert not stale.exists()


def _prepare_and_digest(directory, barrier, results):
    barrier.wait()
    results.put(hashlib.sha256(np.asarray(prepare(small_corpus(), directory=directory).stream())).hexdigest())


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs fork to share the barrier"
)
def test_processes_that_prepare_at_once_agree(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    directory = tmp_path / "packed"
    workers = [
        context.Process(target=_prepare_and_digest, args=(directory, barrier, results)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    digests = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(digests) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["packed"]


def test_damaged_packed_data_is_refused_and_remade(dataset, tmp_path):
    directory = dataset.directory
    good = {path.name: path.read_bytes() for path in directory.iterdir()}
    manifest = json.loads(good["manifest.json"])
    flipped = bytes([good["train.bin"][0] ^ 1]) + good["train.bin"][1:]
    outside = {**manifest, "splits": json.loads(json.dumps(manifest["splits"]))}
    outside["splits"]["train"]["tokens"]["file"] = "../../secret"
    damages = [
        ("train.bin", flipped, "damaged"),
        ("train.bin", good["train.bin"][:-2], "bytes"),
        ("train_documents.npy", good["train_documents.npy"][:-1] + b"x", "damaged"),
        ("train.bin", None, "missing"),
        ("manifest.json", good["manifest.json"][:100], "cannot be read"),
        ("manifest.json", b"[]", "not a manifest"),
        ("manifest.json", json.dumps({**manifest, "version": 99}).encode(), "version 99"),
        ("manifest.json", json.dumps({**manifest, "dtype": "object"}).encode(), "dtype"),
        ("manifest.json", json.dumps({**manifest, "splits": {}}).encode(), "train"),
        ("manifest.json", json.dumps(outside).encode(), "file"),
    ]
    for name, content, message in damages:
        if content is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(content)
        with pytest.raises(PackedDataError, match=message):
            PackedDataset(directory, "train")
        with pytest.warns(UserWarning, match="preparing the data again"):
            remade = prepare(small_corpus(), directory=directory)
        assert (directory / "train.bin").read_bytes() == good["train.bin"], name
        assert remade.n_tokens == dataset.n_tokens


def test_a_directory_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not packed data"):
        prepare(small_corpus(), directory=tmp_path)
    with pytest.raises(PackedDataError, match="manifest.json is missing"):
        PackedDataset(tmp_path)
    with pytest.raises(ValueError, match="no document"):
        prepare(Corpus([]), directory=tmp_path / "new")
    with pytest.raises(ValueError, match="split must be"):
        PackedDataset(tmp_path, "test")


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, ("x", "dsv2")),
        ("linux", {}, ("h", ".cache", "dsv2")),
        ("darwin", {}, ("h", "Library", "Caches", "dsv2")),
        ("win32", {"LOCALAPPDATA": "/l"}, ("l", "dsv2", "Cache")),
    ],
)
def test_the_cache_is_the_users(monkeypatch, platform, variables, expected):
    for name in ("DSV2_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/h", "USERPROFILE": "/h", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dsv2.data.packing.sys.platform", platform)
    assert cache_directory().parts[1:] == expected


# N-grams ------------------------------------------------------------------------------------------


def slow_probability(
    history: list[int], target: int, tokens: list[int], order: int, vocab_size: int
) -> float:
    """Witten-Bell by the definition, counting in the text itself every time."""
    if order == 0:
        return 1 / vocab_size
    shorter = slow_probability(history[1:], target, tokens, order - 1, vocab_size)
    followers = [
        tokens[place + order - 1]
        for place in range(len(tokens) - order + 1)
        if tokens[place : place + order - 1] == history
    ]
    if not followers:
        return shorter
    kinds = len(set(followers))
    return (followers.count(target) + kinds * shorter) / (len(followers) + kinds)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ngrams_equal_a_count_by_hand(order):
    rng = random.Random(order)
    vocab_size = 7
    tokens = [rng.choice((0, 1, 1, 2, 5)) for _ in range(60)]
    rows = np.array([[rng.randrange(vocab_size) for _ in range(9)] for _ in range(4)])
    model = NGramModel(order, vocab_size).fit(tokens)
    nats = model.nats(rows[:, :-1], rows[:, 1:])
    for row, line in zip(rows.tolist(), nats):
        for place, value in enumerate(line):
            seen = min(order - 1, place + 1)
            history = row[place + 1 - seen : place + 1]
            expected = -math.log(slow_probability(history, row[place + 1], tokens, seen + 1, vocab_size))
            assert value == pytest.approx(expected, rel=1e-12)  # the same sums in float64


def test_ngram_probabilities_sum_to_one_seen_and_unseen(dataset):
    model = NGramModel(4, 264).fit(dataset.stream())
    rng = np.random.default_rng(0)
    stream = np.asarray(dataset.stream())
    contexts = [stream[place : place + 5] for place in rng.integers(0, len(stream) - 5, 20)]
    contexts += [rng.integers(0, 264, length) for length in (0, 1, 2, 3, 7) for _ in range(5)]
    contexts += [[256], [257, 256], [263, 263, 263]]
    for context in contexts:
        distribution = model.distribution(context)
        assert distribution.shape == (264,) and distribution.min() > 0
        assert distribution.sum() == pytest.approx(1, abs=1e-12)  # 264 float64 additions
        if len(context):
            row = np.asarray(context)[None]
            scored = [model.nats(row, np.append(row[:, 1:], [[token]], 1))[0, -1] for token in (0, 104, 257)]
            assert np.exp(-np.array(scored)) == pytest.approx(distribution[[0, 104, 257]], rel=1e-12)


def test_longer_ngrams_fit_the_training_text_better(dataset):
    windows = dataset.validation_windows(32)
    model = NGramModel(4, 264).fit(dataset.stream())
    losses = [model.nats(windows.tokens, windows.targets, order).mean() for order in (1, 2, 3, 4)]
    assert losses == sorted(losses, reverse=True)


def test_nats_per_byte_counts_specials_above_and_not_below():
    assert nats_per_byte([1.0, 2.0, 3.0], [97, 98, 257]) == 3.0
    with pytest.raises(ValueError, match="no byte"):
        nats_per_byte([1.0], [256])


def test_ngrams_refuse_wrong_requests():
    with pytest.raises(ValueError, match="order must lie in 1..7"):
        NGramModel(8, 264)
    with pytest.raises(ValueError, match="fit"):
        NGramModel(2).nats(np.zeros((1, 1), int), np.zeros((1, 1), int))
    with pytest.raises(ValueError, match="0..263"):
        NGramModel(2).fit([1, 300])
    model = NGramModel(2).fit([1, 2, 3])
    with pytest.raises(ValueError, match="one shape"):
        model.nats(np.zeros((1, 2), int), np.zeros((1, 3), int))
    with pytest.raises(ValueError, match="order"):
        model.distribution([1], order=3)


def test_baselines_of_a_dataset(dataset):
    rows = ngram_baselines(dataset, (1, 3), seq_len=16)
    assert [row["order"] for row in rows] == [1, 3]
    assert rows[1]["nats_per_byte"] < rows[0]["nats_per_byte"] < math.log(264)
    for row in rows:
        assert row["bits_per_byte"] == pytest.approx(row["nats_per_byte"] / math.log(2))
        assert row["nats_per_token"] < row["nats_per_byte"]  # fewer bytes than targets
        assert set(row["domains"]) == {"code", "english"}


# Command line -------------------------------------------------------------------------------------


def test_command_line_prints_the_table_samples_and_baselines(tmp_path, capsys):
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(f"This is paragraph {n} of my own text. " * 30 for n in range(60)))
    arguments = ["--domains", "arithmetic", "text", "--text", str(text), "--max-mb", "0.05"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--order", "3"]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "arithmetic",
        "generated problems",
        "1 file of yours",
        "--- text",
        "nats",
        "not redistributed",
    ):
        assert expected in shown
    assert main([*arguments, "--out", str(tmp_path / "out"), "--order", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["domain"] for row in report["domains"]] == ["arithmetic", "text"]
    assert len(report["ngrams"]) == 2
    assert PackedDataset(report["directory"]).n_tokens == report["train_tokens"]


def test_command_line_errors_are_one_line(tmp_path, capsys):
    assert main(["--text", str(tmp_path / "missing.txt"), "--domains", "text"]) == 2
    problem = capsys.readouterr().err
    assert problem.startswith("dsv2.data: no text file at") and problem.count("\n") == 1
    assert main(["--domains", "poetry"]) == 2
    with pytest.raises(SystemExit):
        main(["--order", "9"])
