import numpy as np
import pytest

from dlm_dist import randomness


def test_philox_is_the_published_generator():
    # Random123's known-answer test for philox4x64-10 with counter 0 and key 0; numpy counts before it draws.
    ones = np.full(4, 2**64 - 1, dtype=np.uint64)
    words = np.random.Philox(key=np.zeros(2, dtype=np.uint64), counter=ones).random_raw(4)
    assert [hex(int(word)) for word in words] == [
        "0x16554d9eca36314c",
        "0xdb20fe9d672d0fdc",
        "0xd7e772cee186176b",
        "0x7e68b68aec7ba23b",
    ]


def test_golden_vectors_never_change():
    assert randomness.uint64(1, "mask", 7, 4).tolist() == [
        688782741544034136,
        12766555334855578145,
        16194441471304187148,
        12881386980313568293,
    ]
    assert randomness.hash_uint64(12345, np.array([0, 1, 2**40])).tolist() == [
        7296505265971709018,
        11206662324040110238,
        13028583619016484777,
    ]
    assert randomness.derive_seed(3, "a", 1) == 7055417924252135205


def test_a_longer_stream_begins_with_the_shorter():
    assert (randomness.uint64(1, "x", 5, 100)[:10] == randomness.uint64(1, "x", 5, 10)).all()


@pytest.mark.parametrize("other", [(2, "mask", 7), (1, "time", 7), (1, "mask", 8)])
def test_seed_purpose_and_position_each_make_another_stream(other):
    assert not (randomness.uint64(1, "mask", 7, 64) == randomness.uint64(*other, 64)).any()


def test_streams_of_positions_do_not_overlap():
    words = np.concatenate([randomness.uint64(0, "mask", position, 1000) for position in range(200)])
    assert len(np.unique(words)) == len(words)


def test_uniform_is_uniform_on_the_half_open_interval():
    values = randomness.uniform(9, "u", 0, 200_000)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts = np.bincount((values * 20).astype(int), minlength=20)
    assert (abs(counts - 10_000) < 4 * np.sqrt(10_000 * 0.95)).all()


def test_hash_bits_are_balanced_and_keys_differ():
    values = np.arange(100_000)
    hashed = randomness.hash_uint64(1, values)
    bits = (hashed[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert (abs(bits.mean(axis=0) - 0.5) < 4 * 0.5 / np.sqrt(len(values))).all()
    assert not (hashed == randomness.hash_uint64(2, values)).any()
    assert len(np.unique(hashed)) == len(values)
