"Training on several labels an image: settings that do not fit, losses over processes, resuming, judging, exporting."
import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Child, check_same_run, noise
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score
from test_distributed import together

from aaai_lt.core import ConfigError, DataError, Stopped
from aaai_lt.data.augment import augment_batch, augment_options, draws
from aaai_lt.data.predictions import probabilities
from aaai_lt.hardware.export import export_run, read_metadata
from aaai_lt.training import loop
from aaai_lt.training.config import make_config, quick_config
from aaai_lt.training.evaluate import evaluate, other_data, per_class_of, predictions_frame, run_data, summary_of
from aaai_lt.training.loop import epoch_order
from aaai_lt.training.prepare import prepare
from aaai_lt.training.run import Run

SETTINGS = {'loss': 'bce', 'model': 'test_resnet', 'input_size': 32, 'epochs': 2, 'batch_size': 8, 'warmup_epochs': 0.5, 'device': 'cpu', 'workers': 1, 'val_fraction': 0.25}


def silent(text): pass


@pytest.fixture
def images(home):
    "40 images of noise in the layout of the AICOSS challenge, with an unknown entry, an empty row, and a class that training never shows."
    matrix = (np.random.default_rng(0).random((40, 5)) < [0.6, 0.4, 0.3, 0.2, 0.0]).astype(int)
    matrix[3], matrix[5, 1] = 0, -1
    for i in range(46): noise(home/'aicoss'/('train' if i < 40 else 'test')/f'{i:02}.png', i, (36, 28))
    rows = pd.DataFrame({'img_id': [f'IMG_{i:03}' for i in range(46)], 'img_path': [f"./{'train' if i < 40 else 'test'}/{i:02}.png" for i in range(46)]})
    rows[:40].join(pd.DataFrame(matrix, columns=list('abcde'))).to_csv(home/'aicoss'/'train.csv', index=False)
    rows[40:].to_csv(home/'aicoss'/'test.csv', index=False)
    return home/'aicoss'


def train(data, **changes): return loop.train(make_config(**{'data': str(data)} | SETTINGS | changes), say=silent, stop=changes.pop('stop', None))


# -- what does not go together

def test_settings_that_do_not_fit(home, images):
    for changes, message in (({'loss': 'focal'}, 'for one label an image, and aicoss has several.*bce'), ({'select': 'accuracy'}, 'choose mAP, last'), ({'adjust_tau': 1.0}, 'adjust_tau'), ({'head': 'arcface'}, 'arcface')):
        with pytest.raises(ConfigError, match=message): prepare(make_config(**{'data': str(images)} | SETTINGS | changes), False)
    with pytest.raises(ConfigError, match='for several labels an image, and digits has one.*cross_entropy'): prepare(make_config(data='digits', loss='bce'), False)
    with pytest.raises(ConfigError, match='choose balanced_accuracy'): prepare(make_config(data='digits', select='mAP'), False)
    assert not (home/'outputs').exists()  # nothing was written
    assert quick_config(make_config(data='', loss='bce', quick=True)).data == 'digits-mosaic:0.05' and quick_config(make_config(data='', quick=True)).data == 'digits'


# -- a run, whole

def test_a_run(home, images):
    run = train(images, name='run')
    predictions, judged = run.predictions('val'), run.per_class
    assert run.multilabel and predictions.multilabel and predictions.meta['activation'] == 'sigmoid' and predictions.targets.dtype == np.int8 and predictions.targets.shape == (len(predictions), 5)
    assert all(i.startswith('IMG_') for i in predictions.ids) and list(run.history.columns[5:9]) == ['val_loss', 'val_mAP', 'val_CF1', 'val_OF1']
    p = probabilities(predictions).astype('float64')
    for row in judged.itertuples():
        c = predictions.classes.index(row[1])
        known = predictions.targets[:, c] >= 0
        if row.support: assert np.isclose(row.average_precision, average_precision_score(predictions.targets[known, c], p[known, c]), atol=1e-6)
        else: assert np.isnan(row.average_precision)
    z = judged.iloc[4]
    assert (z['class'], z.train_images, z.support) == ('e', 0, 0)  # never shown, never averaged
    assert np.isclose(run.summary['val']['mAP'], judged.average_precision.mean()) and run.summary['val']['over'] == judged.average_precision.notna().sum() and run.summary['best_epoch'] == run.history.val_mAP.argmax() + 1
    again = evaluate(run, 'val', say=pytest.fail)
    assert np.allclose(again.scores, predictions.scores, atol=1e-5) and np.array_equal(again.targets, predictions.targets) and list(again.ids) == list(predictions.ids)
    assert summary_of(per_class_of(again, run_data(run, progress=False)), again)['mAP'] == run.summary['val']['mAP']
    frame = predictions_frame(predictions)
    assert frame.predicted[0] == ';'.join(c for c, v in zip('abcde', p[0]) if v >= 0.5) and set(frame.correct) <= {0, 1}
    comparison = export_run(run, run_data(run, progress=False).table, 8)
    assert (comparison.agreement == 1).all() and read_metadata(run.folder/'model.onnx')['activation'] == 'sigmoid'
    assert (export_run(run, run_data(run, progress=False).table, 8, 'nhwc', activation=True).max_difference < 1e-4).all()


def test_images_without_labels(home, images):
    run = train(images, name='run', epochs=1)
    said = evaluate(run, data=images/'test.csv')
    assert said.targets is None and said.multilabel and list(said.ids) == [f'IMG_{i:03}' for i in range(40, 46)] and said.scores.shape == (6, 5)
    folder = evaluate(run, data=images/'test')
    assert sorted(folder.ids) == [f'{i}.png' for i in range(40, 46)] and np.allclose(said.scores, folder.scores[np.argsort(folder.ids)])
    assert list(predictions_frame(said).columns[:2]) == ['file', 'predicted']
    (images/'other.csv').write_text('path,label\ntrain/00.png,a;c\ntrain/01.png,c\ntrain/02.png,a;c\ntrain/03.png,a\n')
    with pytest.raises(DataError, match='has one label an image'): other_data(run, images/'other.csv', progress=False)
    few = train(images, name='few', epochs=1, columns={'separator': ';'} | {'labels': list('abcde')})
    other = other_data(few, images/'train.csv', progress=False)
    assert (other.splits['new'].labels[5] == [*(v if i != 1 else -1 for i, v in enumerate(other.splits['new'].labels[5]))]).all()


def test_classes_that_one_split_never_shows(home, pack):
    run = train(pack('tiny')/'multilabel.csv', name='run', epochs=1, columns={'labels': 'airplane bare-soil buildings cars chaparral court dock field grass mobile-home pavement sand sea ship tanks trees water'.split()})
    judged = run.per_class
    assert len(judged) == 17 and (judged.support == 0).any() and (judged.train_images == 0).any()
    assert judged.average_precision.notna().tolist() == (judged.support > 0).tolist() and run.summary['val']['over'] == (judged.support > 0).sum() < 17


# -- order, mixing, resuming

def test_class_aware_order():
    matrix = (np.random.default_rng(0).random((400, 6)) < np.geomspace(0.7, 0.02, 6)).astype('int8')
    matrix[:5, 5], matrix[7, 0] = 1, -1
    order = epoch_order(matrix, 'class_balanced', 0, 3)
    assert len(order) == 400 and np.array_equal(order, epoch_order(matrix, 'class_balanced', 0, 3)) and (matrix[order] == 1).any(1).all()
    own = (matrix[:, 5] == 1).sum()
    assert (matrix[order, 5] == 1).sum() >= 400 // 6 and np.bincount(order, minlength=400)[matrix[:, 5] == 1].min() >= 400 // 6 // own


@pytest.mark.parametrize('loss', ['bce', 'asl', 'zlpr', 'two_way'])
def test_losses_take_what_mixing_makes(loss):
    from aaai_lt.losses.factory import make_loss
    targets = torch.tensor([[1.0, 0, -1], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    u = draws(0, 0, np.arange(4))
    _, mixed = augment_batch(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), targets, u, augment_options('none', {'mixup': 0.4}), 8, torch.zeros(3), torch.ones(3), 3)
    assert (mixed[0, 2], mixed[3, 2]) == (-1, -1) and ((mixed == -1) | (mixed >= 0)).all() and mixed.max() <= 1
    try: value = make_loss(loss, [3, 3, 2])(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), mixed)
    except (ConfigError, ValueError) as error: pytest.skip(f'{loss} does not take soft labels: {error}')
    assert torch.isfinite(value)


@pytest.mark.parametrize('changes', [{'sampler': 'class_balanced', 'accumulate': 2, 'loss': 'two_way'}, {'loss': 'asl', 'augment_options': {'mixup': 0.4}, 'ema': 0.9, 'save_every': 2}])
def test_stopped_is_as_not_stopped(home, images, changes):
    whole = train(images, name='whole', **changes)
    for steps in (1, 2):
        count = iter(range(100))
        with pytest.raises(Stopped): loop.train(make_config(**{'data': str(images), 'name': 'stopped'} | SETTINGS | changes), say=silent, stop=lambda: next(count) + 1 >= steps)
    check_same_run(train(images, name='stopped', **changes).folder, whole.folder)


def test_killed_is_as_not_killed(home, images):
    from helpers import launched
    words = [f'data={images}', 'name=run', 'save_every=1', 'epochs=4', *(f'{k}={v}' for k, v in SETTINGS.items() if k != 'epochs')]
    child = Child(home, launched, *words)
    child.wait_for(lambda: (home/'outputs'/'run'/'checkpoint').is_dir() and len(list((home/'outputs'/'run'/'checkpoint').glob('step-*'))) > 1)
    child.kill()
    assert not Run(home/'outputs'/'run').finished
    rest = Child(home, launched, *words)
    assert rest.wait() == 0, rest.text()
    check_same_run(home/'outputs'/'run', train(images, name='whole', save_every=1, epochs=4).folder)


# -- processes

def in_float64(words):
    "The command in double precision: the settings know 32 and 16 bits only, so the model and its images are changed here."
    from aaai_lt.training import loop
    from aaai_lt.training.launch import main
    build, augment, evaluation = loop.build_model, loop.augment_batch, loop.eval_batch
    loop.build_model = lambda config, data: build(config, data).double()
    loop.augment_batch = lambda *a, **k: (lambda images, targets: (images.double(), targets))(*augment(*a, **k))
    loop.eval_batch = lambda *a, **k: evaluation(*a, **k).double()
    return main(words)


COMMAND = ['model=convnext_atto', 'input_size=32', 'epochs=4', 'batch_size=7', 'optimizer=sgd', 'lr=0.02', 'warmup_epochs=0', 'weight_decay=0.0', 'device=cpu', 'workers=1', 'val_fraction=0.25']


@pytest.mark.parametrize('loss, options', [pytest.param('two_way', '{}', marks=pytest.mark.recipes), ('asl', '{reduction: sum}')])
def test_two_processes_train_as_one(home, images, loss, options):
    "Losses that couple the rows of a batch, or add them up; batches that do not divide evenly; over 20 steps in double precision."
    for name, world in (('one', 1), ('two', 2)):
        codes, texts = together(home, f'data={images}', f'loss={loss}', f'loss_options={options}', f'name={name}', *COMMAND, world=world, main=in_float64)
        assert codes == [0] * world, texts
    one, two = (Run(home/'outputs'/name) for name in ('one', 'two'))
    before, after = (load_file(run.folder/'best.safetensors') for run in (one, two))
    assert all(v.dtype == np.float64 for v in before.values()) and one.history.step.iloc[-1] >= 20
    largest = max(np.abs(v).max() for v in before.values())
    assert max(np.abs(before[k] - after[k]).max() for k in before) < 1e-9 * largest
    start = json.loads((one.folder/'summary.json').read_text())
    np.testing.assert_allclose(two.history.train_loss, one.history.train_loss, rtol=1e-9)
    np.testing.assert_allclose(two.history.val_loss, one.history.val_loss, rtol=1e-6)  # validation keeps its logits in 32 bits
    assert abs(two.summary['val']['mAP'] - start['val']['mAP']) < 1e-4
    a, b = one.predictions('val'), two.predictions('val')
    assert list(a.ids) == list(b.ids) and np.array_equal(a.targets, b.targets) and np.allclose(a.scores, b.scores, atol=1e-5)


def test_two_processes_in_single_precision(home, images):
    for name, world in (('one', 1), ('two', 2)):
        codes, texts = together(home, f'data={images}', 'loss=two_way', f'name={name}', *COMMAND, world=world)
        assert codes == [0] * world, texts
    one, two = (Run(home/'outputs'/name) for name in ('one', 'two'))
    assert abs(two.summary['val']['mAP'] - one.summary['val']['mAP']) < 1e-4 and np.allclose(one.history.val_mAP, two.history.val_mAP, atol=1e-4)
