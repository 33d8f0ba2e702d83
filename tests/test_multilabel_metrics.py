"Average precision against scikit-learn, what must not change it, what is left out, bad input, and memory that does not grow with the classes."
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score

from aaai_lt.analysis.thresholds import best_threshold, class_confusion, cooccurrence_errors, label_calibration, label_reliability, pair_counts, tune_thresholds
from aaai_lt.core import DataError
from aaai_lt.data.predictions import Predictions
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
    assert summary == {'mAP': None, 'micro_mAP': None, 'CF1': None, 'OF1': None, 'over': 0, 'not_held_out': 0, 'classes': 3, 'images': 5, 'many': None, 'medium': None, 'few': None}
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


# -- thresholds, calibration, errors by pair

def predictions(targets, scores, split='val', kind='probabilities'): return Predictions(np.asarray(scores, 'float32'), np.arange(len(scores)).astype(str), tuple(f'c{i}' for i in range(scores.shape[1])), targets, {'kind': kind, 'activation': 'sigmoid', 'split': split})


@given(SETS)
def test_best_threshold_is_the_best_of_all(shape):
    "No other threshold has a higher F1, and the F1 is that of the decision: also with ties, in float32, for unknown entries."
    targets, scores = made(*shape)
    for c in range(targets.shape[1]):
        t, s = targets[:, c] == 1, scores[:, c]
        threshold, f1 = best_threshold(s[t], s[~t])
        if not t.any(): assert np.isnan(threshold) and np.isnan(f1); continue
        yes = s >= np.unique(s)[:, None]
        every = 2 * (yes & t).sum(1) / (yes.sum(1) + t.sum())
        assert np.isclose(f1, max(every)) and np.isclose(f1, f1_score(t, s.astype('float64') >= threshold))


@given(SETS, st.floats(0, 100))
def test_thresholds_between_own_and_common(shape, strength):
    "More positives, nearer to one's own; none, the common one; probabilities throughout; logits give the same as their probabilities."
    targets, scores = made(*shape)
    targets[0, 0] = 1
    logits, p = predictions(targets, scores, kind='logits'), predictions(targets, 1 / (1 + np.exp(-scores.astype('float64'))))
    table, same = tune_thresholds(logits, strength), tune_thresholds(p, strength)
    assert np.allclose(table.threshold, same.threshold, atol=1e-4) and ((table.threshold > 0) & (table.threshold < 1)).all()
    seen = table[table.support > 0]
    assert ((seen.threshold >= seen[['own', 'common']].min(axis=1) - 1e-6) & (seen.threshold <= seen[['own', 'common']].max(axis=1) + 1e-6)).all()
    assert (table.threshold == table.common)[table.support == 0].all() and (strength > 0 or (seen.threshold == seen.own).all())


def test_thresholds_see_no_test_split_and_no_unknown():
    targets, scores = made(0, 300, 6, None, 'float64')
    targets[:2] = 1
    p = 1 / (1 + np.exp(-scores))
    with pytest.raises(DataError, match='tuned on validation'): tune_thresholds(predictions(targets, p, 'test'))
    with pytest.raises(DataError, match='there is none'): tune_thresholds(predictions(targets * 0, p))
    with pytest.raises(DataError, match='labels of each image'): tune_thresholds(predictions(targets[:, 0].astype('int64'), p))
    known = np.random.default_rng(0).random(targets.shape) < 0.6
    found = tune_thresholds(predictions(np.where(known, targets, -1), p), 0)
    for c in range(6): assert np.isclose(found.own[c], best_threshold(p[known[:, c] & (targets[:, c] == 1), c].astype('float32'), p[known[:, c] & (targets[:, c] == 0), c].astype('float32'))[0], equal_nan=True)


@given(SETS)
def test_calibration_of_labels(shape):
    "Against a loop over classes and bins; the known entries only."
    targets, scores = made(*shape)
    targets[np.random.default_rng(shape[0]).random(targets.shape) < 0.3] = -1
    found = predictions(targets, 1 / (1 + np.exp(-scores)))
    p, table = found.scores.astype('float64'), label_calibration(found, 5)
    for c in range(targets.shape[1]):
        known = targets[:, c] >= 0
        q, t = p[known, c], targets[known, c]
        if not known.any(): assert np.isnan(table.calibration_error[c]); continue
        bins = np.clip(np.ceil(q * 5).astype(int) - 1, 0, 4)
        assert np.isclose(table.calibration_error[c], sum(abs(q[bins == b].sum() - t[bins == b].sum()) for b in range(5)) / len(q), atol=1e-6)
        assert np.isclose(table.mean_score[c], q.mean(), atol=1e-6) and np.isclose(table.frequency[c], t.mean())
    assert label_reliability(found, 5).images.sum() == (targets >= 0).sum()


@given(SETS)
def test_two_by_two_and_pairs(shape):
    "Counted image by image."
    targets, scores = made(shape[0], min(shape[1], 40), min(shape[2], 5), *shape[3:])
    targets[np.random.default_rng(shape[0]).random(targets.shape) < 0.3] = -1
    found, (n, c) = predictions(targets, 1 / (1 + np.exp(-scores))), targets.shape
    said = found.scores >= 0.5
    table = class_confusion(found).set_index('class')
    for k in range(c):
        cells = [(a, b) for a, b in zip(targets[:, k], said[:, k])]
        assert table.loc[f'c{k}', ['right', 'missed', 'added', 'right_absent']].tolist() == [cells.count(cell) for cell in ((1, True), (1, False), (0, True), (0, False))]
    pairs = pair_counts(found, 0.5, rows=7)
    for kind, there in (('missed', 1), ('added', 0)):
        for a in range(c):
            for b in range(c):
                for i, beside in ((0, 1), (2, 0)):
                    chances = [r for r in range(n) if targets[r, a] == beside and targets[r, b] == there]
                    assert pairs[kind][i + 1, a, b] == len(chances) and pairs[kind][i, a, b] == sum(said[r, b] != there for r in chances)


def test_a_label_that_hides_another_is_found():
    "Label 2 is said with label 0 though not there, and label 1 is missed beside it: these two come first."
    random = np.random.default_rng(0)
    targets = (random.random((2000, 5)) < 0.4).astype('int8')
    said = targets ^ (random.random(targets.shape) < 0.05)
    hidden, invented = (targets[:, 0] == 1) & (random.random(2000) < 0.5), (targets[:, 0] == 1) & (random.random(2000) < 0.4)
    said[hidden, 1], said[invented, 2] = 0, 1
    table = cooccurrence_errors(predictions(targets, said.astype('float32')), rows=4)
    assert {tuple(row) for row in table[['error', 'label', 'beside']].head(2).to_numpy()} == {('missed', 'c1', 'c0'), ('added', 'c2', 'c0')}
    assert table.too_many[1] > 5 * table.too_many[2]
