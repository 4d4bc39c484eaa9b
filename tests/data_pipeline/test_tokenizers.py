from __future__ import annotations

import copy
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.tokenizer_backends.bpe import FAMILIES
from data_pipeline.tokenizer_backends.byte_alphabet import BYTE_OF_CHARACTER, spelled_bytes
from data_pipeline.tokenizer_backends.bytes import ByteTokenizer
from data_pipeline.tokenizer_backends.characters import CharacterTokenizer
from data_pipeline.tokenizers import EOS_MARK, MASK_MARK, NAMES, Tokenizer, load

HARD_TEXT = "'S I'll  x\r\n\r\n\t 12345 \u0663 \u4e16\u754c \U0001f600\u200d e\u0301\x00 <|endoftext|> <|im_end|>  "
any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


def small_json(folder: Path, metaspace: bool = False, more: tuple[str, ...] = ()) -> Path:
    """A little tokenizer.json: byte-level, or split at spaces with words as entries."""
    added = ["<|endoftext|>", "<|im_end|>", *more]
    if metaspace:
        vocabulary = {"<unk>": 0, "\u2581caf\u00e9": 1, "\u2581b": 2, "c": 3}
        model = hf.models.BPE(
            {**vocabulary, **{c: i for i, c in enumerate("\u2581af\u00e9b", 4)}}, [], unk_token="<unk>"
        )
        tokenizer = hf.Tokenizer(model)
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
        tokenizer.decoder = hf.decoders.Metaspace()
    else:
        characters = sorted(BYTE_OF_CHARACTER)
        vocabulary = {character: i for i, character in enumerate([*characters, "th"])}
        tokenizer = hf.Tokenizer(hf.models.BPE(vocabulary, [("t", "h")]))
        tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_special_tokens(added)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=["rwkv-world", "bytes", "characters", "qwen", "gpt2", "json", "minimind"])
def tokenizer(
    request: pytest.FixtureRequest, real_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "characters":
        return CharacterTokenizer.learn([HARD_TEXT, "abc"])
    if request.param == "json":
        return load(small_json(tmp_path_factory.mktemp("json")))
    if request.param in ("qwen", "gpt2", "minimind"):
        return load(real_data(f"tok_{request.param}"))
    return load(request.param)


def seen_by(tokenizer: Tokenizer, text: str) -> str:
    return unicodedata.normalize("NFC", text) if tokenizer.name == "qwen" else text


def test_text_survives_and_bytes_are_exact(tokenizer: Tokenizer) -> None:
    per_id = tokenizer.token_bytes()
    assert per_id is not None
    assert per_id.shape == (tokenizer.vocab_size,)
    ids = tokenizer.encode(HARD_TEXT)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == seen_by(tokenizer, HARD_TEXT)
    assert per_id[ids].sum() == len(seen_by(tokenizer, HARD_TEXT).encode())
    assert [len(one) for one in tokenizer.encode_batch(["", "abc"])] == [0, len(tokenizer.encode("abc"))]


def test_reserved_ids_are_in_range_and_never_produced(tokenizer: Tokenizer) -> None:
    per_id = tokenizer.token_bytes()
    assert per_id is not None
    reserved = {tokenizer.eos_id, tokenizer.mask_id}
    assert len(reserved) == 2
    assert max(reserved) < tokenizer.vocab_size <= tokenizer.padded_vocab_size
    assert tokenizer.padded_vocab_size % 64 == 0
    assert not reserved & set(tokenizer.encode(HARD_TEXT).tolist())
    assert [per_id[one] for one in reserved] == [0, 0]
    shown = tokenizer.decode([tokenizer.mask_id, *tokenizer.encode("abc"), tokenizer.eos_id])
    assert shown == f"{MASK_MARK}abc{EOS_MARK}"


def test_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "once")
    again = load(tmp_path / "once")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.describe() == tokenizer.describe()
    assert again.encode(HARD_TEXT).tolist() == tokenizer.encode(HARD_TEXT).tolist()
    again.save(tmp_path / "twice")
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


def test_another_mask_id(tokenizer: Tokenizer, tmp_path: Path) -> None:
    fingerprint, own, size = tokenizer.fingerprint, tokenizer.mask_id, tokenizer.vocab_size
    for taken in (-1, tokenizer.eos_id, int(tokenizer.encode("a")[0])):
        with pytest.raises(DataError, match="cannot be the mask of"):
            tokenizer.use_mask_id(taken)
    assert tokenizer.fingerprint == fingerprint
    other = copy.copy(tokenizer)
    other.use_mask_id(size + 3)
    assert (other.mask_id, other.vocab_size) == (size + 3, size + 4)
    assert other.fingerprint != fingerprint
    assert other.decode([size + 3]) == MASK_MARK
    other.save(tmp_path)
    assert load(tmp_path).describe() == other.describe()
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (own, size)


@given(any_text)
def test_world_and_bytes_keep_any_text(text: str) -> None:
    for tokenizer in (_WORLD, ByteTokenizer()):
        per_id = tokenizer.token_bytes()
        assert per_id is not None
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert per_id[ids].sum() == len(text.encode())


_WORLD = load("rwkv-world")


def test_world_ids_are_the_published_ones() -> None:
    assert (_WORLD.vocab_size, _WORLD.eos_id, _WORLD.mask_id) == (65536, 0, 65535)
    assert _WORLD.encode("Hello world\n").tolist() == [33155, 40213, 11]
    assert _WORLD.encode("\x00").tolist() == [1]


def test_world_vocabulary_is_the_same_with_other_line_ends(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    original = real_data("tok_rwkv/rwkv_vocab_v20230424.txt")
    (tmp_path / "vocab.txt").write_bytes(original.read_bytes().replace(b"\n", b"\r\n"))
    assert load(original).fingerprint == load(tmp_path / "vocab.txt").fingerprint == _WORLD.fingerprint


def test_qwen_and_gpt2_agree_with_hf_tokenizers(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    poems = real_data("chinese_poetry/poems.jsonl").read_text(encoding="utf-8").split("\n")[:50]
    peps = real_data("peps/peps.jsonl").read_text(encoding="utf-8").split("\n")[:20]
    texts = [HARD_TEXT, *poems, *(line[:20_000] for line in peps)]
    for folder, base_size in (("tok_qwen", 151643), ("tok_gpt2", 50256)):
        ours = load(real_data(folder))
        ours.save(tmp_path / folder)
        vocabulary = json.loads((tmp_path / folder / "vocab.json").read_text(encoding="utf-8"))
        merges = (tmp_path / folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
        theirs = hf.Tokenizer(hf.models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
        words = hf.pre_tokenizers.Split(hf.Regex(FAMILIES[base_size].pattern), "isolated")
        spelled = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs.pre_tokenizer = hf.pre_tokenizers.Sequence([words, spelled])
        theirs.decoder = hf.decoders.ByteLevel()
        if folder == "tok_qwen":
            theirs.normalizer = hf.normalizers.NFC()
        theirs.add_special_tokens(["<|endoftext|>"])
        (tmp_path / "hf" / folder).mkdir(parents=True)
        theirs.save(str(tmp_path / "hf" / folder / "tokenizer.json"))
        through_json = load(tmp_path / "hf" / folder)
        for text, a, b in zip(texts, ours.encode_batch(texts), through_json.encode_batch(texts), strict=True):
            assert a.tolist() == b.tolist(), text[:80]
        assert (through_json.eos_id, through_json.mask_id) == (ours.eos_id, ours.mask_id)
        assert np.array_equal(through_json.token_bytes(), ours.token_bytes())


def test_qwen_has_its_published_ids(real_data: Callable[[str], Path]) -> None:
    qwen = load(real_data("tok_qwen"))
    assert (qwen.vocab_size, qwen.eos_id, qwen.mask_id) == (151936, 151643, 151669)
    assert qwen.encode("Hello world").tolist() == [9707, 1879]
    gpt2 = load(real_data("tok_gpt2"))
    assert (gpt2.vocab_size, gpt2.padded_vocab_size, gpt2.eos_id, gpt2.mask_id) == (50258, 50304, 50256, 50257)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]


def test_a_beginning_of_text_is_known_by_its_usual_spellings_and_never_written(tmp_path: Path) -> None:
    assert load(small_json(tmp_path / "none")).bos_id is None
    tokenizer = load(small_json(tmp_path / "bos", more=("<|begin_of_text|>",)))
    assert tokenizer.bos_id == tokenizer.eos_id + 2
    assert tokenizer.bos_id not in tokenizer.encode("<|begin_of_text|>a")
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").bos_id == tokenizer.bos_id
    assert load("bytes").bos_id is None


def test_without_fixed_bytes_per_id_the_bytes_still_sum_to_the_text(tmp_path: Path) -> None:
    tokenizer = load(small_json(tmp_path, metaspace=True))
    assert not tokenizer.exact_bytes
    assert tokenizer.token_bytes() is None
    texts = ["caf\u00e9 b", "b \U0001f600 caf\u00e9", ""]
    for text, (ids, counts) in zip(texts, tokenizer.encode_with_bytes(texts), strict=True):
        assert len(ids) == len(counts)
        assert counts.sum() == len(text.encode())
        assert (counts >= 0).all()


def test_byte_alphabet_spells_each_byte_once() -> None:
    assert sorted(BYTE_OF_CHARACTER.values()) == list(range(256))
    for character, value in BYTE_OF_CHARACTER.items():
        assert spelled_bytes(character) == bytes([value])
    assert spelled_bytes("\u0120caf\u00c3\u00a9") == " caf\u00e9".encode()
    for outside in (" ", "\n", "\u4e16", "\u0144"):
        assert spelled_bytes(outside) is None


def test_character_vocabulary_does_not_depend_on_order() -> None:
    one, other = CharacterTokenizer.learn(["abc", "\u00e9"]), CharacterTokenizer.learn(["\u00e9b", "ca"])
    assert one.fingerprint == other.fingerprint
    assert one.encode("abc\u00e9").tolist() == [0, 1, 2, 3]
    assert (one.eos_id, one.mask_id, one.vocab_size) == (4, 5, 6)
    with pytest.raises(DataError, match=r"'z' \(U\+007A\) is not in the vocabulary"):
        one.encode("az")


def test_damaged_saved_tokenizer_is_refused(tmp_path: Path) -> None:
    CharacterTokenizer.learn(["abc"]).save(tmp_path)
    (tmp_path / "characters.json").write_text("[97, 98, 100]")
    with pytest.raises(DataError, match="is not the one that was saved there"):
        load(tmp_path)


def test_what_cannot_be_loaded_is_named(tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    with pytest.raises(DataError, match="'nothing' is neither a tokenizer"):
        load("nothing")
    with pytest.raises(DataError, match="learned from text"):
        load("characters")
    with pytest.raises(DataError, match="holds no tokenizer"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is no tokenizer\.json that HF tokenizers can read"):
        load(tmp_path)
    (tmp_path / "words.txt").write_text("hello\n")
    with pytest.raises(DataError, match="is no RWKV vocabulary"):
        load(tmp_path / "words.txt")
    assert NAMES == ("rwkv-world", "characters", "bytes")


def test_vocabulary_whose_ids_are_not_in_merge_order_is_refused(
    tmp_path: Path, real_data: Callable[[str], Path]
) -> None:
    shutil.copy(real_data("tok_gpt2/gpt2_vocab.json"), tmp_path / "vocab.json")
    merges = real_data("tok_gpt2/gpt2_merges.txt").read_text(encoding="utf-8").split("\n")
    merges[10], merges[11] = merges[11], merges[10]
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    with pytest.raises(DataError, match=r"do not follow its merges \(merge 11"):
        load(tmp_path)
