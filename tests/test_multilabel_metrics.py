"Average precision against scikit-learn, what must not change it, what is left out, bad input, and memory that does not grow with the classes."
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix

from aaai_lt.core import DataError
from aaai_lt.training.multilabel import average_precision, describe_multilabel, map_interval, micro_average_precision, per_class_multilabel, summarise_multilabel

SETS = st.tuples(st.integers(0, 2 ** 31), st.integers(1, 200), st.integers(1, 40), st.sampled_from([None, 1, 3, 50]), st.sampled_from(['float64', 'float32']))


def made(seed, images, classes, levels, dtype):
    "A set with classes from common to empty and scores with as many ties as asked."
    random = np.random.default_rng(seed)
    targets = (random.random((images, classes)) < random.random(classes) ** 3).astype('int8')
    scores = random.normal(size=targets.shape) + random.random(classes) * targets
    return targets, (scores if levels is None else np.round(scores * levels) / levels).astype(dtype)


@given(SETS)
def test_equals_scikit_learn(shape):
    targets, scores = made(*shape)
    found = average_precision(targets, scores)
    for c, value in enumerate(found):
        if targets[:, c].any(): assert abs(value - average_precision_score(targets[:, c], scores[:, c])) < 1e-9
        else: assert np.isnan(value)
    if targets.any(): assert abs(micro_average_precision(targets, scores) - average_precision_score(targets, scores, average='micro')) < 1e-9


@given(SETS)
def test_unknown_entries_are_as_if_not_there(shape):
    targets, scores = made(*shape)
    known = np.random.default_rng(shape[0]).random(targets.shape) < 0.7
    found = average_precision(np.where(known, targets, -1), scores)
    for c in range(targets.shape[1]): assert np.array_equal(found[c:c + 1], average_precision(targets[known[:, c], c][:, None], scores[known[:, c], c][:, None]), equal_nan=True)


@given(SETS, st.integers(1, 50))
def test_what_does_not_matter(shape, block):
    "The order of images and classes, the size of a block, and any rising function of the scores."
    targets, scores = made(*shape)
    found, random = average_precision(targets, scores), np.random.default_rng(shape[0])
    rows, columns = random.permutation(targets.shape[0]), random.permutation(targets.shape[1])
    assert np.array_equal(average_precision(targets[rows][:, columns], scores[rows][:, columns], block), found[columns], equal_nan=True)
    assert np.allclose(average_precision(targets, np.exp(scores.astype('float64') / 3)), found, equal_nan=True, atol=1e-12)
    seen = found[~np.isnan(found)]
    assert ((seen > 0) & (seen <= 1)).all()


def test_inputs_are_left_alone_and_may_be_mapped(tmp_path):
    targets, scores = made(1, 300, 40, 3, 'float32')
    np.save(tmp_path/'scores.npy', scores)
    mapped = np.load(tmp_path/'scores.npy', mmap_mode='r')
    copies = targets.copy(), scores.copy()
    assert np.array_equal(average_precision(targets, mapped), average_precision(targets.astype('float32'), scores), equal_nan=True)
    micro_average_precision(targets, scores), map_interval(targets, scores, 10)
    assert (targets == copies[0]).all() and (scores == copies[1]).all()


@pytest.mark.parametrize('classes', [100, 800])
def test_memory_does_not_grow_with_the_classes(classes):
    "A block of columns is copied, never the whole: the same few megabytes for 100 and for 800 classes."
    targets, scores = np.zeros((4000, classes), 'int8'), np.zeros((4000, classes), 'float32')
    targets[::9], scores[:] = 1, np.random.default_rng(0).random(scores.shape, 'float32')
    tracemalloc.start()
    average_precision(targets, scores)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # the scores of 800 classes alone are 12.8e6 bytes


@given(SETS)
def test_the_table_counts_like_scikit_learn(shape):
    targets, scores = made(*shape)
    thresholds = np.random.default_rng(shape[0]).normal(size=targets.shape[1])
    table = per_class_multilabel(targets, scores, range(targets.shape[1]), np.arange(targets.shape[1]), thresholds, not_held_out=[0])
    theirs = np.array([confusion_matrix(t, yes, labels=[0, 1]) for t, yes in zip(targets.T, (scores >= thresholds).T)])
    assert np.array_equal(table.correct, theirs[:, 1, 1]) and np.array_equal(table.predicted, theirs[:, :, 1].sum(1)) and np.array_equal(table.support, theirs[:, 1].sum(1))
    assert (table.threshold == thresholds).all() and not table.held_out[0] and table.held_out[1:].all()
    assert table.precision.isna().equals(table.predicted == 0) and table.recall.isna().equals(table.support == 0) and table.f1.isna().equals(table.support == 0)


def test_nothing_positive():
    targets, scores = np.zeros((5, 3), 'int8'), np.random.default_rng(0).random((5, 3))
    summary = summarise_multilabel(per_class_multilabel(targets, scores, 'abc', [1, 30, 200]), targets, scores)
    assert summary == {'mAP': None, 'micro_mAP': None, 'CF1': None, 'OF1': None, 'over': 0, 'classes': 3, 'images': 5, 'many': None, 'medium': None, 'few': None}
    assert describe_multilabel(summary) == 'no image with a label' and np.isnan(map_interval(targets, scores)).all()


def test_interval():
    "The same for the same seed; all of one kind has no spread; more images, less of it; a perfect ranking is certain."
    targets, scores = made(0, 400, 5, None, 'float64')
    targets[:3] = 1
    low, high = map_interval(targets, scores, seed=4)
    assert (low, high) == map_interval(targets, scores, seed=4) != map_interval(targets, scores, seed=5)
    wide = np.diff(map_interval(targets, scores, level=0.99))[0]
    assert wide > high - low > np.diff(map_interval(np.repeat(targets, 4, 0), np.repeat(scores, 4, 0), seed=4))[0]
    assert map_interval(targets, targets * 1.0) == (1.0, 1.0)


def test_bad_input():
    with pytest.raises(DataError, match=r'targets of shape \(3, 2\) and scores of shape \(3, 3\)'): average_precision(np.zeros((3, 2)), np.zeros((3, 3)))
    with pytest.raises(DataError, match=r'shape \(3,\)'): micro_average_precision(np.zeros(3), np.zeros(3))
    with pytest.raises(DataError, match='class 40 has a score that is not a number'): average_precision(np.ones((2, 50)), np.where(np.arange(50) == 40, np.nan, np.zeros((2, 50))))
