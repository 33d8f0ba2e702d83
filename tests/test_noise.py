"Near copies, planted noise, out-of-fold answers and the cleaning rules: what must hold whatever the data are."
import numpy as np
import pandas as pd
import pytest
from helpers import content, image_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aaai_lt.analysis import copies
from aaai_lt.analysis.explorer import record, review
from aaai_lt.analysis.noise import RULES, clean, cleaned_counts, confident_classes, contradicted, fixes_of, judge_rules, noise_counts, spared, suspicious, to_review, write_fixes
from aaai_lt.core import DataError
from aaai_lt.data.builtin import draw_sign, read_builtin
from aaai_lt.data.planted import plant_noise
from aaai_lt.data.predictions import Predictions
from aaai_lt.data.scan import scan
from aaai_lt.data.split import split_table
from aaai_lt.data.table import read_images
from aaai_lt.training.config import make_config
from aaai_lt.training.folds import draw_folds, fold_data, out_of_fold
from aaai_lt.training.prepare import look_at_data, prepare


def sign(folder, name, seed, **options):
    "A drawn sign as a file."
    path = folder/name
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sign(seed % 89, np.random.default_rng(seed)).resize((90, 80)).save(path, **options)
    return path


# --- near copies

@given(st.integers(0, 2 ** 32), st.integers(0, 15), st.integers(2, 60))
def test_close_pairs_are_those_of_all_pairs(seed, radius, number):
    "Multi-index hashing against the comparison of all pairs, on hashes that lie near each other."
    random = np.random.default_rng(seed)
    hashes = np.repeat(random.integers(0, 2 ** 64, number, dtype='uint64'), 3)
    for _ in range(radius): hashes ^= np.where(random.random(len(hashes)) < 0.7, np.uint64(1) << random.integers(0, 64, len(hashes)).astype('uint64'), np.uint64(0))
    found = {(min(a, b), max(a, b)): d for one, other, bits in copies.close_pairs(hashes, radius) for a, b, d in zip(one.tolist(), other.tolist(), bits.tolist())}
    slow = {(a, b): (int(hashes[a]) ^ int(hashes[b])).bit_count() for a in range(len(hashes)) for b in range(a + 1, len(hashes))}
    assert found == {pair: d for pair, d in slow.items() if 0 < d <= radius}


def test_fifty_thousand_hashes_need_few_comparisons(monkeypatch):
    "Counted, not timed: random hashes are compared with a thousandth of the others, equal ones with one."
    random, compared = np.random.default_rng(0), []
    bucket_pairs = copies.bucket_pairs
    def counting(*arguments):
        for one, other in bucket_pairs(*arguments):
            compared.append(len(one))
            yield one, other
    monkeypatch.setattr(copies, 'bucket_pairs', counting)
    hashes = random.integers(0, 2 ** 64, 50_000, dtype='uint64')
    for _ in copies.close_pairs(hashes, 7): pass
    assert 0 < sum(compared) < 50_000 ** 2 / 2 / 500 and max(compared) < 3 << 20
    compared.clear()
    looked, look = [], copies.look_difference
    monkeypatch.setattr(copies, 'look_difference', lambda faces, one, other: (looked.append(len(one)), look(faces, one, other))[1])
    links, group = copies.look_links(np.zeros(50_000, 'uint64'), np.full((50_000, 768), 7, 'uint8'))
    assert sum(looked) < 50_000 and len(links) == 49_999 and group.max() == 0 and sum(compared) == 0


def test_copies_are_found_under_re_encoding(tmp_path):
    "Scaled, compressed, in grey, with another aspect: 40 pictures and no false friend."
    random = np.random.default_rng(1)
    for i in range(40):
        path = sign(tmp_path, f'a/{i:02}.png', i)
        image = Image.open(path)
        scale = random.uniform(0.6, 1.6, 2)
        image.resize(tuple(int(side * s) for side, s in zip(image.size, scale))).save(tmp_path/'a'/f'{i:02}-again.{"jpg" if i % 2 else "webp"}', quality=int(random.integers(40, 90)))
    table = scan(read_images(tmp_path), progress=False)
    near = copies.near_copies(table, copies.build_store(table, 32, folder=tmp_path/'store', progress=False)[0])
    groups = near.groupby('group').path.agg(lambda paths: {p.split('/')[1][:2] for p in paths})
    assert all(len(group) == 1 for group in groups), 'two different pictures were taken for one'
    assert len(near) >= 2 * 38, f'only {len(near) // 2} of 40 copies were found'
    by_path = near.set_index('path')
    assert all(by_path.group[row.other] == row.group for row in near.itertuples()) and (near.difference <= 0.3).all()


def test_a_store_of_another_size_is_refused(home):
    table = scan(read_builtin('digits'), progress=False)
    with pytest.raises(DataError, match='32 are needed'): copies.near_copies(table, copies.build_store(table, 16, progress=False)[0])
    with pytest.raises(DataError, match='0 to 15'): next(copies.close_pairs(np.zeros(3, 'uint64'), 16))


# --- confident learning

def plain_confident_learning(p, labels):
    "Northcutt et al. 2021, section 3.1 and 'prune by noise rate', one image at a time."
    n, classes = p.shape
    limits = [np.mean([p[i, j] for i in range(n) if labels[i] == j]) if (labels == j).any() else np.inf for j in range(classes)]
    joint = np.zeros((classes, classes))
    for i in range(n):
        reached = [j for j in range(classes) if p[i, j] >= limits[j]]
        if reached: joint[labels[i], max(reached, key=lambda j: p[i, j])] += 1
    pruned = set()
    for a in range(classes):
        if not joint[a].sum(): continue
        for b in range(classes):
            k = round(joint[a, b] / joint[a].sum() * (labels == a).sum())
            if a == b or not k: continue
            mine = sorted((i for i in range(n) if labels[i] == a), key=lambda i: (-(p[i, b] - p[i, a]), i))[:k]
            pruned |= {i for i in mine if p[i, b] > p[i, a]}
    return pruned


@given(st.integers(0, 2 ** 32), st.integers(2, 6), st.integers(1, 80))
def test_contradicted_is_the_plain_rule(seed, classes, number):
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.full(classes, 0.5), number).astype('float32')
    labels = np.where(random.random(number) < 0.7, p.argmax(1), random.integers(0, classes, number))
    rows, other = contradicted(p, labels, portion=7)
    assert set(rows.tolist()) == plain_confident_learning(p, labels) and len(set(rows.tolist())) == len(rows)
    margins = p[rows, other] - p[rows, labels[rows]]
    assert (margins > 0).all() and (np.diff(margins) <= 0).all()
    counts = noise_counts(p, labels)
    known = np.isin(labels, counts.given)
    assert np.isclose(counts.images.sum(), known.sum()) and (confident_classes(p, labels) < classes).all()


# --- the floor

@given(st.data())
def test_the_floor_always_holds(data):
    counts = np.array(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6)))
    share, least = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 12))
    rows = [(c, data.draw(st.sampled_from(RULES[1:])), data.draw(st.floats(0, 10))) for c, n in enumerate(counts) for _ in range(data.draw(st.integers(0, int(n))))]
    found = pd.DataFrame(rows, columns=['label', 'rule', 'score'])
    keep = spared(found, counts, share, least)
    left = counts - np.bincount(found.label[~keep].astype(int), minlength=len(counts))
    assert (left >= np.minimum(counts, np.maximum(np.ceil(share * counts - 1e-9), np.minimum(least, counts)))).all()
    for label, part in found.assign(keep=keep, sure=found.rule.map(RULES.index)).groupby('label'):
        gone, stays = part[~part.keep], part[part.keep]
        if len(gone) and len(stays): assert max(zip(gone.sure, -gone.score)) <= min(zip(stays.sure, -stays.score))  # the least suspicious are spared
        if len(stays): assert left[label] == max(np.ceil(share * counts[label] - 1e-9), min(least, counts[label]))  # and no more than needed


# --- the whole

@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    "A small set with every kind of copy and a broken file."
    folder = tmp_path_factory.mktemp('odd')
    image_folder(folder, {'cat': 12, 'dog': 10})
    for name, seed in (('cat/sign.png', 1), ('dog/sign.png', 1), ('cat/twin.png', 2), ('dog/only.png', 3)): sign(folder, name, seed)
    Image.open(folder/'cat'/'twin.png').resize((60, 60)).save(folder/'cat'/'twin small.jpg', quality=80)
    Image.open(folder/'dog'/'only.png').resize((120, 100)).save(folder/'cat'/'two of three.png')
    Image.open(folder/'dog'/'only.png').resize((100, 120)).save(folder/'dog'/'three of three.jpg', quality=90)
    (folder/'dog'/'broken.png').write_bytes((folder/'dog'/'000.png').read_bytes()[:200])
    return folder


def test_rules_name_what_they_should(odd, tmp_path):
    before = content(odd)
    table = split_table(scan(read_images(odd), progress=False), val_fraction=0)
    near = copies.near_copies(table, copies.build_store(table, 32, folder=tmp_path, progress=False)[0])
    fixes = clean(table, near, least=3)
    assert dict(zip(fixes.path, fixes.rule)) == {'dog/broken.png': 'unreadable', 'cat/sign.png': 'conflict', 'dog/sign.png': 'conflict', 'cat/two of three.png': 'conflict', 'cat/twin small.jpg': 'copy', 'dog/only.png': 'copy'}
    assert (fixes.action == 'drop').all() and fixes.reason.str.len().min() > 5  # of the two that agree the larger stays; of three labels the majority's
    write_fixes(fixes, tmp_path/'fixes.csv')
    assert not {'dog/broken.png', 'cat/sign.png', 'dog/sign.png'} & set(read_images(odd).with_fixes(tmp_path/'fixes.csv').frame.path)  # on the table as it is read, and on a scanned one
    assert table.with_fixes(tmp_path/'fixes.csv').counts('train').tolist() == cleaned_counts(table, fixes).after.tolist()
    assert set(clean(table, near, rules=('copy',)).rule) == {'copy'} and not len(clean(table, near, rules=('outlier',)))
    assert content(odd) == before
    with pytest.raises(DataError, match='did you mean'): clean(table, near, rules=('copie',))


def test_the_answer_decides_between_two_labels(odd, tmp_path):
    "With out-of-fold probabilities the label that models believe wins, and a held-out copy sends the training image away."
    table = split_table(scan(read_images(odd), progress=False), val_fraction=0)
    near = copies.near_copies(table, copies.build_store(table, 32, folder=tmp_path, progress=False)[0])
    train = table.split('train')
    p = np.where(np.arange(2) == train.label.to_numpy()[:, None], 0.9, 0.1).astype('float32')
    p[train.path == 'dog/sign.png'] = [0.95, 0.05]
    answers = Predictions(p, train.path.to_numpy(object), table.classes, train.label.to_numpy(), {'kind': 'probabilities', 'split': 'train'})
    fixes = clean(table, near, answers, least=3).set_index('path')
    assert fixes.rule['dog/sign.png'] == 'conflict' and fixes.suggestion['dog/sign.png'] == 'cat' and 'cat/sign.png' not in fixes.index
    assert clean(table, near, answers, least=3, relabel_above=0.9).set_index('path').loc['dog/sign.png', ['action', 'label']].tolist() == ['relabel', 'cat']
    held = table.with_frame(table.frame.assign(split=np.where(table.frame.path == 'cat/twin.png', 'val', 'train')))
    leaks = suspicious(held, near.assign(split=np.where(near.path == 'cat/twin.png', 'val', 'train')))
    assert leaks[leaks.rule == 'leak'].path.tolist() == ['cat/twin small.jpg'] and not held.frame.path[held.frame.split == 'val'].isin(leaks.path).any()


def test_decisions_of_people_count(odd, tmp_path):
    table = split_table(scan(read_images(odd), progress=False), val_fraction=0)
    near = copies.near_copies(table, copies.build_store(table, 32, folder=tmp_path, progress=False)[0])
    fixes, decisions = clean(table, near, least=3), tmp_path/'decisions.csv'
    shown = to_review(fixes)
    panel = review(table, shown, decisions)
    assert len(shown) == 5 and '1 of 5' in panel.children[0].value
    record(decisions, 'cat/sign.png', 'accept')
    record(decisions, 'dog/sign.png', 'relabel', 'cat')
    write_fixes(fixes, tmp_path/'fixes.csv', decisions)
    after = table.with_fixes(tmp_path/'fixes.csv').frame.set_index('path').label
    assert after['cat/sign.png'] == 0 and after['dog/sign.png'] == 0 and 'dog/only.png' not in after


def test_planted_noise_is_what_was_asked_for(tmp_path):
    table = read_builtin('digits', tmp_path/'builtin')
    truth = plant_noise(table, tmp_path/'one', seed=3)
    n = len(table.split('train'))
    assert truth.kind.value_counts().to_dict() == {'': n - round(0.2 * n) - round(0.1 * n), 'symmetric': round(0.2 * n), 'pairwise': round(0.1 * n), 'duplicate': round(0.03 * n), 'outsider': round(0.03 * n)}
    assert (truth.true[truth.kind == 'pairwise'].astype(int) + 1).mod(10).eq(truth.label[truth.kind == 'pairwise'].astype(int)).all()
    assert plant_noise(table, tmp_path/'two', seed=3).equals(truth) and content(tmp_path/'one').keys() == content(tmp_path/'two').keys()
    assert (tmp_path/'one'/'images.zip').read_bytes() == (tmp_path/'two'/'images.zip').read_bytes()
    assert set(truth.label[truth.kind == '']) == set(table.classes)  # each class has kept an image
    with pytest.raises(DataError, match='there already'): plant_noise(table, tmp_path/'one')
    with pytest.raises(DataError, match='keeps one'): plant_noise(table, tmp_path/'three', symmetric=0.9, pairwise=0.1)


# --- folds

@given(st.integers(0, 2 ** 32), st.integers(2, 5), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_folds_are_even_and_keep_groups_together(seed, folds, sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    if len(labels) < folds: return
    groups = np.random.default_rng(seed).integers(0, max(len(labels) // 2, 1), len(labels))
    fold = draw_folds(labels, folds, groups, seed)
    assert all(len(set(fold[groups == g])) == 1 for g in set(groups)) and set(fold) <= set(range(folds))
    alone = draw_folds(labels, folds, None, seed)
    assert all(np.ptp(np.bincount(alone[labels == c], minlength=folds)) <= 1 for c in range(len(sizes)))


def test_out_of_fold_sees_no_image_it_judges(home, monkeypatch):
    "What each run trains on and what it judges are apart; copies stay together; a second call trains nothing; other data under the old name are refused."
    from aaai_lt.training import folds
    config = make_config(epochs=1, warmup_epochs=0.0, input_size=16, name='f')
    data, seen = prepare(config, progress=False), []
    train_one = folds.train_one
    def watched(one, part, **others):
        seen.append((one.name, set(part.splits['train'].ids), set(part.splits['val'].ids), one.select))
        return train_one(one, part, **others)
    monkeypatch.setattr(folds, 'train_one', watched)
    ids = data.splits['train'].ids
    near = pd.DataFrame({'path': ids[:40], 'group': np.arange(40) // 2})
    answers = out_of_fold(config, 3, near, data, say=lambda text: None)
    assert [name for name, *_ in seen] == ['f-fold1of3', 'f-fold2of3', 'f-fold3of3'] and all(select == 'last' for *_, select in seen)
    assert all(not train & val and train | val == set(ids) for _, train, val, _ in seen) and set.union(*(val for _, _, val, _ in seen)) == set(ids)
    assert all(len({next(i for i, s in enumerate(seen) if path in s[2]) for path in ids[k:k + 2]}) == 1 for k in range(0, 40, 2))
    assert not set(data.splits['test'].ids) & set(answers.ids) and list(answers.ids) == list(ids)
    said = []
    again = out_of_fold(config, 3, near, data, say=said.append)
    assert np.array_equal(again.scores, answers.scores) and all('is finished' in line for line in said)
    with pytest.raises(DataError, match='other folds'): out_of_fold(config, 3, near, data, seed=1, say=lambda text: None)
    part = fold_data(data, draw_folds(data.splits['train'].labels, 3) == 0)
    assert part.hash != data.hash and part.class_counts.sum() == len(part.splits['train'])


@pytest.mark.slow  # the notebook of analysis/noise plants, finds and mends in every run of the tests
def test_cleaning_finds_planted_noise(home):
    "End to end on digits: planted, trained, cleaned, read by a run; better than chance by far, and no held-out image touched."
    truth = plant_noise(read_builtin('digits'), home/'noisy')
    config = make_config(name='n', data=str(home/'noisy'), epochs=12, input_size=32, batch_size=32, lr=1e-3, select='last', augment_options={'hflip': 0.0, 'rotate': 10.0})
    table, data = look_at_data(config, progress=False), prepare(config, progress=False)
    near = copies.near_copies(table, difference=0.2, progress=False)
    answers = out_of_fold(config, 3, near, data, say=lambda text: None)
    found = suspicious(table, near, answers)
    judged = judge_rules(found, truth, table.counts(), table.classes).set_index(['rule', 'band'])
    assert judged.precision['disagreement', 'all'] > 0.7 and judged.recall['disagreement', 'all'] > 0.7 and judged.recall['conflict', 'all'] > 0.7
    assert set(found.path) <= set(table.split('train').path)
    fixes = fixes_of(table, found, answers)
    write_fixes(fixes, home/'fixes.csv')
    after = prepare(make_config(name='c', data=str(home/'noisy'), fixes=str(home/'fixes.csv')), progress=False)
    wrong = truth.set_index('path').kind != ''
    assert wrong[after.splits['train'].ids].mean() < 0.6 * wrong[data.splits['train'].ids].mean()
    assert [len(after.splits[s]) for s in ('val', 'test')] == [len(data.splits[s]) for s in ('val', 'test')]
    assert (after.class_counts >= np.minimum(data.class_counts, 3)).all()
