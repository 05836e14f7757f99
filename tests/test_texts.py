"""Text that is on every machine, and that what is for tests is in nothing else."""

import pytest

from tensorlayers.errors import ConversionError
from tensorlayers.texts import docstring_sentences, library_sentences, part_of, sources


def test_sentences_are_real_and_the_same_each_time():
    sentences = docstring_sentences(64)
    assert sentences == docstring_sentences(64)
    assert sentences != docstring_sentences(64, seed=1)
    assert len(set(sentences)) == 64
    assert all(30 <= len(sentence) <= 200 for sentence in sentences)


def test_parts_are_disjoint_and_whole():
    parts = [docstring_sentences(part=part) for part in ("calibration", "test")]
    assert set(parts[0]).isdisjoint(parts[1])
    assert set(parts[0]) | set(parts[1]) == set(docstring_sentences())
    assert len(parts[0]) > len(parts[1]) > 1000
    modules = [f"module{k}" for k in range(1000)]
    assert 500 < sum(part_of(module) == "calibration" for module in modules) < 700


def test_the_whole_library_has_more_and_none_of_the_tests():
    parts = [library_sentences(part) for part in ("calibration", "test")]
    assert set(parts[0]).isdisjoint(parts[1])
    assert set(parts[0]).isdisjoint(docstring_sentences(part="test"))
    assert len(parts[0]) > 2 * len(docstring_sentences(part="calibration"))


def test_sources_are_of_one_part_each():
    parts = [sources(part) for part in ("calibration", "test")]
    assert set(parts[0]).isdisjoint(parts[1])
    assert sum(map(len, parts[0])) > sum(map(len, parts[1])) > 1e6


def test_an_unknown_part_is_refused():
    with pytest.raises(ConversionError, match="part: one of calibration, test, or None for all; got 'train'"):
        docstring_sentences(part="train")
