from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.packing import PackedStream, with_end
from data_pipeline.rows import document_ids

EOS = 0
documents = st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=12)


def stream_of(parts: list[np.ndarray], sequence_length: int) -> PackedStream:
    return PackedStream([len(part) for part in parts], parts.__getitem__, sequence_length)


@given(documents, st.integers(1, 17), st.data())
def test_rows_are_the_documents_with_one_end_each(
    docs: list[list[int]], sequence_length: int, data: st.DataObject
) -> None:
    joined = [token for doc in docs for token in [*doc, EOS]]
    # Parts cut documents anywhere: a part is a unit of work, not a document.
    cuts = data.draw(st.lists(st.integers(0, len(joined)), max_size=5).map(sorted))
    parts = [np.array(part, dtype=np.uint16) for part in np.split(np.array(joined), cuts)]
    stream = stream_of(parts, sequence_length)
    rows = stream.rows(0, stream.num_rows)
    flat = rows.reshape(-1).tolist()
    assert flat[: len(joined)] == joined
    filling = flat[len(joined) :]
    assert len(filling) == stream.repeated_tokens < sequence_length
    assert filling == (joined * sequence_length)[: len(filling)]
    assert rows.dtype == np.uint16
    first = data.draw(st.integers(0, stream.num_rows - 1))
    stop = data.draw(st.integers(first + 1, stream.num_rows))
    assert np.array_equal(stream.rows(first, stop), rows[first:stop])


@given(documents, st.integers(1, 17))
def test_documents_come_back_from_their_ends(docs: list[list[int]], sequence_length: int) -> None:
    encoded = [with_end(np.array(doc, dtype=np.int32), EOS) for doc in docs]
    stream = stream_of(encoded, sequence_length)
    rows = stream.rows(0, stream.num_rows).astype(np.int64)
    ids = document_ids(rows, EOS)
    for row, numbers in zip(rows, ids, strict=True):
        assert numbers[0] == 0
        # A new document begins exactly behind each end of text.
        assert np.array_equal(np.diff(numbers), (row[:-1] == EOS).astype(int))
    ends = np.flatnonzero(rows.reshape(-1)[: stream.num_tokens] == EOS) + 1
    pieces = np.split(rows.reshape(-1)[: stream.num_tokens], ends)[:-1]
    assert [piece[:-1].tolist() for piece in pieces] == docs


def test_only_needed_parts_are_loaded() -> None:
    loaded: list[int] = []

    def load(part: int) -> np.ndarray:
        loaded.append(part)
        return np.full(10, part)

    stream = PackedStream([10] * 100, load, 5)
    assert stream.rows(20, 22).tolist() == [[10] * 5, [10] * 5]
    assert loaded == [10]
    assert stream.rows(21, 23).tolist() == [[10] * 5, [11] * 5]
    assert loaded == [10, 10, 11]
