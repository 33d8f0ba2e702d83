"A run judged again: the same splits, other images, other sizes, mirrored views, foreign weights; and the analyses beside independent implementations."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from helpers import image_folder, noise
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, confusion_matrix, f1_score, roc_auc_score
from test_train import papermill, report

from aaai_lt.analysis.calibration import calibration_error, classwise_calibration, reliability, top_confidence
from aaai_lt.analysis.errors import confusion_groups, size_correlation, swapped_pairs
from aaai_lt.analysis.gradcam import grad_cam, show_label_cams, worst_label_errors
from aaai_lt.analysis.mirror import mirror_table
from aaai_lt.analysis.roc import class_areas, class_curves, ranking_areas
from aaai_lt.analysis.thresholds import decide_by_parts, tune_thresholds
from aaai_lt.core import ConfigError, DataError, StorageError
from aaai_lt.data.predictions import Predictions, adjust, load_predictions, probabilities
from aaai_lt.data.table import read_bytes
from aaai_lt.training.config import make_config
from aaai_lt.training.evaluate import adopt_weights, data_changes, evaluate, evaluation_folder, other_data, per_class_of, run_data, run_model, validation_of
from aaai_lt.training.loop import train
from aaai_lt.training.prepare import make_table


def silent(text): pass


@pytest.fixture(scope='module')
def module_home(tmp_path_factory):
    home = tmp_path_factory.mktemp('home')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('AAAI_LT_HOME', str(home))
        yield home


@pytest.fixture(scope='module')
def run(module_home):
    "Cross-entropy with post-hoc adjustment: what it writes is not what leaves the network."
    return train(make_config(data='digits', name='mine', input_size=32, epochs=8, loss='cross_entropy', adjust_tau=1.0, device='cpu'), say=silent)


@pytest.fixture(scope='module')
def plain(module_home):
    "Cross-entropy, and nothing adjusted."
    return train(make_config(data='digits', name='plain', quick=True, loss='cross_entropy', device='cpu'), say=silent)


@pytest.fixture(scope='module')
def mosaic(module_home):
    "Several labels an image."
    return train(make_config(data='digits-mosaic:0.1', name='mosaic', quick=True, batch_size=16, device='cpu'), say=silent)


def random_predictions(n=60, c=5, seed=0):
    random = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(c), random.integers(0, c, n - c)])
    return Predictions(random.normal(0, 2, (n, c)).round(1).astype('float32'), np.arange(n).astype(str), tuple('abcdefghij'[:c]), targets)


def test_the_notebook_on_a_fresh_clone(home):
    "On a fresh clone it trains first, then judges on validation."
    code, output = papermill(home, 'evaluate.ipynb', '-p', 'quick', 'True')
    assert code == 0, output[-3000:]
    run, = (home/'outputs').glob('*/evaluate')
    folder = run/'val'
    assert {p.name for p in folder.iterdir()} == {'predictions', 'predictions.csv', 'per_class.csv', 'confusion.csv', 'curves.csv', 'calibration.csv', 'swapped.csv', 'groups.csv', 'mirror.csv', 'problems.csv', 'summary.json'}
    table, summary = pd.read_csv(folder/'predictions.csv'), json.loads((folder/'summary.json').read_text())
    assert np.isclose(summary['accuracy'], accuracy_score(table.true, table.predicted)) and np.isclose(summary['balanced_accuracy'], balanced_accuracy_score(table.true, table.predicted))
    assert (table.correct == (table.true == table.predicted)).all() and (table.filter(like='p ').to_numpy().argmax(1) == table.predicted).all()
    matrix = pd.read_csv(folder/'confusion.csv').iloc[:, 1:].to_numpy()
    assert (matrix == confusion_matrix(table.true, table.predicted)).all()
    per_class = pd.read_csv(folder/'per_class.csv')
    assert per_class.accuracy.is_monotonic_increasing and per_class.held_out.all() and {'support', 'correct', 'low', 'high', 'auc', 'average_precision', 'calibration_error'} <= set(per_class)
    text = report(home)
    assert 'the data are those of the run' in text and 'expected calibration error' in text and 'mirror' in text


def execute(notebook, **parameters):
    "The code cells of a run notebook in this process, without a kernel's seconds; returns its globals and what it printed."
    import contextlib
    import io
    import matplotlib
    matplotlib.use('Agg')
    cells = [''.join(c['source']) for c in json.loads((ROOT/'nbs'/notebook).read_text())['cells'] if c['cell_type'] == 'code']
    at = next(i for i, cell in enumerate(cells) if cell.startswith('# Parameters'))
    cells.insert(at + 1, '\n'.join(['# Parameters', *(f'{name} = {value!r}' for name, value in parameters.items())]))
    space, printed = {'In': []}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in cells:
            space['In'].append(cell)
            exec(compile(cell, notebook, 'exec'), space)
    matplotlib.pyplot.close('all')
    return space, printed.getvalue()


def test_the_notebook_on_training_images_larger_and_with_both_views(run):
    space, printed = execute('evaluate.ipynb', run='mine', split='train', input_size=40, tta='flip')
    folder = run.folder/'evaluate'/'train-40px-flip'
    assert not pd.read_csv(folder/'per_class.csv').held_out.any() and 'held out: 0 of 10' in printed
    predictions = load_predictions(folder/'predictions')
    assert len(predictions) == 298 and predictions.meta['tta'] == 'flip' and predictions.meta['input_size'] == 40 and predictions.meta['split'] == 'train'
    assert json.loads((folder/'summary.json').read_text())['accuracy'] == np.mean(predictions.scores.argmax(1) == predictions.targets)
    with pytest.raises(ConfigError, match="unknown parameter 'splitt': did you mean 'split'"): execute('evaluate.ipynb', splitt='val')
    with pytest.raises(ConfigError, match='tta'): execute('evaluate.ipynb', run='mine', tta='mirror')


def test_the_notebook_on_images_without_labels(run, tmp_path):
    for i in range(3): noise(tmp_path/'flat'/f'{i}.png', i)
    space, printed = execute('evaluate.ipynb', run=str(run.folder), data=str(tmp_path/'flat'))
    assert '3 images without labels' in printed and sorted(p.name for p in space['folder'].iterdir()) == ['predictions', 'predictions.csv', 'problems.csv', 'summary.json']
    assert list(pd.read_csv(space['folder']/'predictions.csv').columns[:3]) == ['file', 'predicted', 'p 0']


@pytest.mark.recipes
def test_the_report_of_several_labels(mosaic, module_home):
    "Thresholds of validation decide the test images; every section has something to say of them."
    code, output = papermill(module_home, 'evaluate.ipynb', '-p', 'run', 'mosaic', '-p', 'split', 'test')
    assert code == 0, output[-3000:]
    folder = mosaic.folder/'evaluate'/'test'
    assert {p.name for p in folder.iterdir()} == {'predictions', 'summary.json', *(f'{name}.csv' for name in ('predictions', 'per_class', 'thresholds', 'decisions', 'confusion', 'cooccurrence', 'images', 'curves', 'calibration', 'mirror', 'problems'))}
    val, test = mosaic.predictions('val'), load_predictions(folder/'predictions')
    thresholds = pd.read_csv(folder/'thresholds.csv', dtype={'class': str})
    assert np.allclose(thresholds.threshold, tune_thresholds(val).threshold, atol=1e-5)
    said, table = probabilities(test) >= tune_thresholds(val).threshold.to_numpy(), pd.read_csv(folder/'predictions.csv', dtype=str, keep_default_na=False)
    assert list(table.predicted) == [';'.join(np.array(test.classes)[row]) for row in said] and list(table.correct.astype(int)) == (said == test.targets).all(1).astype(int).tolist()
    decisions, confusion = (pd.read_csv(folder/f'{name}.csv', dtype={'class': str}).set_index('class') for name in ('decisions', 'confusion'))
    for c, name in enumerate(test.classes):
        assert np.isclose(decisions.f1_tuned[name], f1_score(test.targets[:, c], said[:, c], zero_division=0), atol=1e-5) and np.isclose(decisions.f1[name], f1_score(test.targets[:, c], test.scores[:, c] >= 0, zero_division=0), atol=1e-5)
        assert confusion.loc[name, ['right', 'missed', 'added', 'right_absent']].astype(int).tolist() == confusion_matrix(test.targets[:, c], said[:, c], labels=[0, 1])[[1, 1, 0, 0], [1, 0, 1, 0]].tolist()
    summary = json.loads((folder/'summary.json').read_text())
    assert np.isclose(summary['tuned']['OF1'], f1_score(test.targets, said, average='micro')) and np.isclose(summary['mAP'], average_precision_score(test.targets, probabilities(test), average='macro'))
    from torchmetrics.functional.classification import binary_calibration_error
    assert np.isclose(summary['calibration_error'], binary_calibration_error(torch.from_numpy(probabilities(test).ravel()), torch.from_numpy(test.targets.ravel()).long(), n_bins=15).item(), atol=1e-5)
    text = report(module_home)
    assert 'CF1' in text and 'at one half' in text and 'of all labels' in text and 'an image and its mirror image' in text and 'no labels' not in text


def test_several_labels_on_validation_and_without_labels(mosaic, tmp_path):
    space, printed = execute('evaluate.ipynb', run='mosaic', split='val')
    val = mosaic.predictions('val')
    assert (space['decided'].scores == decide_by_parts(val).scores).all()
    for i in range(3): noise(tmp_path/'flat'/f'{i}.png', i)
    space, printed = execute('evaluate.ipynb', run='mosaic', data=str(tmp_path/'flat'))
    assert '3 images without labels' in printed and sorted(p.name for p in space['folder'].iterdir()) == ['predictions', 'predictions.csv', 'problems.csv', 'summary.json', 'thresholds.csv']
    said = probabilities(space['predictions']) >= tune_thresholds(val).threshold.to_numpy()
    assert list(pd.read_csv(space['folder']/'predictions.csv', dtype=str, keep_default_na=False).predicted) == [';'.join(np.array(val.classes)[row]) for row in said]


def test_thresholds_come_from_answers_made_in_the_same_way(mosaic):
    test = mosaic.predictions('test')
    assert validation_of(mosaic, test).scores is not None and validation_of(mosaic, mosaic.predictions('val')).meta['split'] == 'val'
    mirrored = evaluate(mosaic, 'test', tta='mirror')
    again = validation_of(mosaic, mirrored)
    assert again.meta['tta'] == 'mirror' and np.abs(again.scores - mosaic.predictions('val').scores).max() > 1e-3 and list(again.ids) == list(mosaic.predictions('val').ids)


def test_no_image_has_a_say_in_its_own_decision(mosaic):
    import dataclasses
    val = mosaic.predictions('val')
    before = decide_by_parts(val).scores
    for i in (0, 7, 31):
        targets = val.targets.copy()
        targets[i] = 1 - targets[i]
        assert (decide_by_parts(dataclasses.replace(val, targets=targets)).scores[i] == before[i]).all()


@pytest.mark.parametrize('head', ['linear', 'ml_decoder', 'query2label'])
def test_maps_of_single_labels(mosaic, head):
    "What spoke for a label, with every head; on a map, its sum is the gradient times the features."
    from aaai_lt.models.zoo import make_model
    torch.manual_seed(0)
    model, images = make_model('test_resnet', 10, head=head).eval(), torch.randn(2, 3, 96, 96)
    maps = grad_cam(model, images, torch.tensor([1, 7]))
    assert maps.shape == (2, 3, 3) and maps.isfinite().all() and not torch.equal(maps, grad_cam(model, images, torch.tensor([2, 5])))
    if head == 'linear':
        predictions, data = mosaic.predictions('test'), run_data(mosaic, 64, False)
        errors = worst_label_errors(predictions, count=3)
        for row in errors.itertuples(): assert (predictions.scores[row.image, row.label] >= 0) == (row.error == 'added') != (predictions.targets[row.image, row.label] == 1)
        assert len(show_label_cams(run_model(mosaic), data, predictions, errors).axes) == 2 * len(errors)
        with pytest.raises(ConfigError, match='of 32 px .* a map of 1 × 1'): show_label_cams(run_model(mosaic), run_data(mosaic, progress=False), predictions, errors)


@pytest.mark.parametrize('name, size', [('repvgg_s0', 32), ('swin_tiny_patch4_window7_224', 32), ('test_resnet', 20)])
def test_a_map_of_one_place_is_refused(name, size):
    "With channels first or last; a map of two places is not."
    from aaai_lt.models.zoo import make_model
    model, images = make_model(name, 3, input_size=size).eval(), torch.randn(1, 3, size, size)
    with pytest.raises(ConfigError, match=f'of {size} px .* 1 × 1'): grad_cam(model, images, torch.tensor([1]))
    assert grad_cam(make_model(name, 3, input_size=2 * size).eval(), torch.randn(1, 3, 2 * size, 2 * size), torch.tensor([1])).numel() > 1


def test_the_notebook_goes_on_without_maps(run):
    "At 32 px the network of these digits ends in a map of one place: evaluate.ipynb says so and goes on."
    space, printed = execute('evaluate.ipynb', run='mine')
    assert 'a map of 1 × 1' in printed and (run.folder/'evaluate'/'val'/'summary.json').exists()


def test_a_split_that_was_not_predicted(run):
    with pytest.raises(DataError, match="no predictions of 'tset': did you mean 'test'"): run.predictions('tset')


def test_splits_are_those_of_the_run(run):
    data = run_data(run, progress=False)
    assert data_changes(run, data) == []
    for split in ('val', 'test'):
        again, written = evaluate(run, split, data), run.predictions(split)
        assert list(again.ids) == list(written.ids) and (again.targets == written.targets).all() and again.meta == written.meta
        np.testing.assert_allclose(again.scores, written.scores, atol=1e-4)
    train_ids = evaluate('mine', 'train', data).ids
    assert len(train_ids) == 298 and not set(train_ids) & set(run.predictions('val').ids)
    with pytest.raises(DataError, match="no split 'tets'.*test"): evaluate(run, 'tets', data)


def test_views_are_averaged_before_adjustment_and_softmax(run):
    data = run_data(run, progress=False)
    plain, mirror, flip = (evaluate(run, 'val', data, tta=tta) for tta in ('none', 'mirror', 'flip'))
    np.testing.assert_allclose(flip.scores, (plain.scores + mirror.scores) / 2, atol=1e-5)
    assert np.abs(probabilities(flip) - (probabilities(plain) + probabilities(mirror)) / 2).max() > 1e-3
    pixels = data.store[data.splits['val'].rows]
    turned = other_data_of(run, pixels[:, :, ::-1], run.folder.parent/'turned')
    np.testing.assert_allclose(evaluate(run, data=turned).scores, mirror.scores, atol=1e-3)  # mirrored files give what the mirrored view gives
    assert flip.meta['adjusted'] == 'logit adjustment, tau 1.0' and (flip.meta['tta'], plain.meta['tta']) == ('flip', '')
    with pytest.raises(ConfigError, match='tta'): evaluate(run, 'val', data, tta='flips')


def other_data_of(run, pixels, folder):
    folder.mkdir()
    for i, image in enumerate(pixels): Image.fromarray(np.ascontiguousarray(image)).save(folder/f'{i:04}.png')
    return other_data(run, folder, progress=False)


def test_changed_data_are_said_and_changed_classes_refused(module_home):
    folder = image_folder(module_home/'pictures', {'ant': 12, 'bee': 9, 'cow': 6})
    (folder/'ant'/'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n no more')
    mine = train(make_config(data=str(folder), name='pictures', val_fraction=0.4, input_size=32, epochs=1, batch_size=8, model='repvgg_n1', device='cpu'), say=silent)
    before = evaluate(mine, 'val')
    assert 'broken.png' not in ' '.join(before.ids) and list(before.ids) == list(mine.predictions('val').ids)
    noise(folder/'bee'/'new.png', [9, 9])
    said = []
    evaluate(mine, 'val', say=said.append)
    assert len(said) == 1 and 'have changed' in said[0] and 'val: 9 images then, 10 now' in said[0]
    noise(folder/'dog'/'000.png', [8, 8])
    with pytest.raises(DataError, match='trained on 3 classes.*now have 4'): evaluate(mine, 'val')


def test_whole_groups_stay_together(module_home):
    folder = image_folder(module_home/'grouped', {'ant': 20, 'bee': 12})
    rows = pd.DataFrame([(p.relative_to(folder).as_posix(), p.parent.name, f'{p.parent.name}{int(p.stem) // 4}') for p in sorted(folder.rglob('*.png'))], columns=['path', 'label', 'track'])
    rows.to_csv(folder/'labels.csv', index=False)
    mine = train(make_config(data=str(folder/'labels.csv'), group='track', name='grouped', val_fraction=0.3, input_size=32, epochs=1, batch_size=8, model='repvgg_n1', device='cpu'), say=silent)
    track = dict(zip(rows.path, rows.track))
    parts = {split: {track[i] for i in evaluate(mine, split).ids} for split in ('train', 'val')}
    assert parts['val'] and not parts['train'] & parts['val'] and evaluate(mine, 'val').ids.tolist() == mine.predictions('val').ids.tolist()


def test_other_images_by_name_of_class(run, tmp_path):
    folder = image_folder(tmp_path/'some', {'07': 3, '2': 4})
    labelled = evaluate(run, data=folder)
    assert labelled.classes == tuple('0123456789') and sorted(labelled.targets) == [2] * 4 + [7] * 3 and labelled.meta['split'] == 'new'
    flat = shutil.copytree(folder/'2', tmp_path/'flat')
    unlabelled = evaluate(run, data=flat)
    assert unlabelled.targets is None and len(unlabelled) == 4
    np.testing.assert_allclose(unlabelled.scores, labelled.scores[labelled.targets == 2], atol=1e-5)
    image_folder(folder, {'rex': 1})
    with pytest.raises(DataError, match="'rex'.*unlabelled=True"): evaluate(run, data=folder)
    assert len(evaluate(run, data=folder, unlabelled=True)) == 8
    (folder/'2'/'half.png').write_bytes((folder/'2'/'000.png').read_bytes()[:200])
    assert len(evaluate(run, data=folder, unlabelled=True)) == 8  # listed and left out
    with pytest.raises(DataError, match='holds no images'): evaluate(run, data=shutil.copytree(tmp_path/'flat', tmp_path/'empty', ignore=shutil.ignore_patterns('*.png')), unlabelled=True)
    with pytest.raises(FileNotFoundError, match='nowhere'): evaluate(run, data=tmp_path/'nowhere')


def test_images_that_the_run_was_trained_on_are_not_held_out(run, tmp_path):
    "Under other names, beside images that are new: found by their bytes, said, and their classes marked."
    table = make_table(run.config, progress=False)
    trained, new = table.split('train'), table.split('test')
    for part, names in ((trained[trained.label == 3], ['3/a.png', '3/b.png']), (new[new.label == 3], ['3/c.png']), (new[new.label == 8], ['8/a.png'])):
        for row, name in zip(part.itertuples(), names):
            (tmp_path/'new'/name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/'new'/name).write_bytes(read_bytes(table.root, row.archive, row.path))
    data, lines = other_data(run, tmp_path/'new', progress=False), []
    assert data.not_held_out == {'new': ['3']}
    found = data.table.problems
    assert list(found.path) == ['3/a.png', '3/b.png'] and set(found.reason) == {'seen in training'} and set(found.action) == {'kept'}
    judged = per_class_of(evaluate(run, data=tmp_path/'new', say=lines.append), data).set_index('class')
    assert not judged.held_out['3'] and judged.held_out['8'] and judged.support['3'] == 3 and lines == ['of the files of new 2 kept (2 seen in training)']
    (run.folder/'seen.npy').rename(run.folder/'aside')
    assert other_data(run, tmp_path/'new', progress=False).not_held_out == {'new': []}  # trained before it was noted
    (run.folder/'seen.npy').write_bytes(b'no array')
    with pytest.raises(StorageError, match='seen.npy is damaged'): other_data(run, tmp_path/'new', progress=False)
    (run.folder/'aside').rename(run.folder/'seen.npy')


def test_other_images_in_csv_with_splits_or_without_labels(run, tmp_path):
    image_folder(tmp_path/'images', {'3': 4})
    rows = pd.DataFrame({'file': [f'3/{i:03}.png' for i in range(4)] + ['3/gone.png'], 'label': 3, 'split': ['val', 'val', 'test', 'test', 'test']})
    rows.to_csv(tmp_path/'images'/'listed.csv', index=False)
    assert len(evaluate(run, 'val', data=tmp_path/'images'/'listed.csv')) == 2
    with pytest.raises(DataError, match="no split 'train'"): evaluate(run, 'train', data=tmp_path/'images'/'listed.csv')
    rows[['file']].to_csv(tmp_path/'images'/'plain.csv', index=False)
    data = other_data(run, tmp_path/'images'/'plain.csv', unlabelled=True, progress=False)
    assert len(data.splits['new']) == 4 and data.table.problems.reason.tolist() == ['missing']
    rows[['label']].to_csv(tmp_path/'images'/'no_paths.csv', index=False)
    with pytest.raises(DataError, match='no column for path'): other_data(run, tmp_path/'images'/'no_paths.csv', unlabelled=True, progress=False)


def test_foreign_weights_and_other_weights(run, tmp_path):
    own = run.folder/'best.safetensors'
    torch.save(load_file(own), tmp_path/'foreign.pth')
    settings = {'data': 'digits', 'input_size': 32, 'epochs': 8, 'loss': 'cross_entropy', 'adjust_tau': 1.0, 'device': 'cpu'}
    adopted = adopt_weights(tmp_path/'foreign.pth', progress=False, **settings)
    assert adopted.finished and adopted.summary['test'] == run.summary['test'] and adopted.data['hash'] == run.data['hash']
    assert train(adopted.config, say=silent).folder == adopted.folder  # finished: nothing is trained over it
    with pytest.raises(ConfigError, match='does not fit'): adopt_weights(tmp_path/'foreign.pth', progress=False, **settings | {'model': 'repvgg_n1'})
    data = run_data(run, progress=False)
    zeroed = {name: torch.zeros_like(t) if name.startswith('head.') else t for name, t in torch.load(tmp_path/'foreign.pth', weights_only=True).items()}
    torch.save(zeroed, tmp_path/'zeroed.pth')
    constant = evaluate(run, 'val', data, weights=tmp_path/'zeroed.pth')
    assert np.ptp(constant.scores, axis=0).max() == 0 and constant.meta['weights_sha256'] != evaluate(run, 'val', data).meta['weights_sha256']
    assert evaluation_folder(run, constant, data, tmp_path/'zeroed.pth').name == 'val-zeroed'


def test_a_finished_run_is_adjusted_afterwards(run, plain, mosaic):
    "By hand: tau · log(share of the training images) taken off each logit. What is adjusted already is refused, whoever did it; so are several labels."
    data, counts = run_data(plain, progress=False), np.array(plain.data['class_counts'], float)
    before, after = evaluate(plain, 'test', data), evaluate(plain, 'test', data, adjust_tau=0.7)
    assert np.allclose(after.scores, before.scores - 0.7 * np.log(counts / counts.sum()), atol=1e-5) and np.ptp(after.scores - before.scores, axis=1).max() > 1
    assert before.meta['adjusted'] == '' and after.meta['adjusted'] == 'logit adjustment, tau 0.7'
    assert evaluation_folder(plain, after, data, adjust_tau=0.7).name == 'test-tau0.7'
    with pytest.raises(DataError, match='adjusted already'): adjust(after, np.zeros(10), 'again')
    with pytest.raises(DataError, match='adjusted already .logit adjustment, tau 1.0'): evaluate(run, 'val', adjust_tau=0.5)
    balanced = train(make_config(data='digits', name='balanced', quick=True, epochs=1, warmup_epochs=0.5, loss='balanced_softmax', device='cpu'), say=silent)
    with pytest.raises(DataError, match='adjusted already .loss balanced_softmax'): evaluate(balanced, 'val', adjust_tau=0.5)
    with pytest.raises(ConfigError, match='mosaic has several labels'): evaluate(mosaic, 'val', adjust_tau=1.0)
    for tau in (-1.0, float('nan'), '1'):
        with pytest.raises(ConfigError, match='adjust_tau'): evaluate(plain, 'val', adjust_tau=tau)


def test_the_notebook_adjusts(run, plain):
    space, printed = execute('evaluate.ipynb', run='plain', split='test', adjust_tau=1.0)
    written = load_predictions(plain.folder/'evaluate'/'test-tau1'/'predictions')
    assert written.meta['adjusted'] == 'logit adjustment, tau 1.0' and 'logit adjustment, tau 1.0' in printed and (written.scores == evaluate(plain, 'test', adjust_tau=1.0).scores).all()
    assert space['mirrored'].meta['adjusted'] == 'logit adjustment, tau 1.0'  # the two that are compared are adjusted alike
    with pytest.raises(DataError, match='adjusted already'): execute('evaluate.ipynb', run='mine', adjust_tau=1.0)


def test_transformers_take_another_size(module_home):
    vit = train(make_config(data='digits', name='vit', model='vit_tiny_patch16_224', model_options={'depth': 1}, input_size=32, epochs=1, device='cpu'), say=silent)
    assert evaluate(vit, 'val', input_size=64).scores.shape == (180, 10)


@given(st.integers(0, 10 ** 6))
def test_areas_are_those_of_scikit_learn(seed):
    p = random_predictions(seed=seed)
    areas, score = class_areas(p, block=2), probabilities(p)
    for c in range(5):
        assert np.isclose(areas.auc[c], roc_auc_score(p.targets == c, score[:, c])) and np.isclose(areas.average_precision[c], average_precision_score(p.targets == c, score[:, c]))
    one = class_curves(p, ['b'])
    roc = one[one.curve == 'roc']
    assert np.isclose(np.trapezoid(roc.y, roc.x), areas.auc[1])


def test_a_class_without_images_is_blank():
    p = random_predictions()
    without = Predictions(p.scores, p.ids, p.classes, np.where(p.targets == 4, 0, p.targets))
    areas = class_areas(without)
    assert np.isnan(areas.auc[4]) and np.isnan(areas.average_precision[4]) and areas.auc[:4].notna().all()
    assert 'e' not in set(class_curves(without)['class']) and 'e' not in set(mirror_table(without, without)['class'])
    everything = ranking_areas(np.ones((3, 1)), np.ones((3, 1), bool))
    assert np.isnan(everything[0][0]) and everything[1][0] == 1


@given(st.integers(0, 10 ** 6), st.sampled_from([1, 2, 10, 15]))
def test_calibration_error_is_that_of_torchmetrics(seed, bins):
    from torchmetrics.functional.classification import multiclass_calibration_error
    p = random_predictions(seed=seed)
    score = torch.from_numpy(probabilities(p))
    assert np.isclose(calibration_error(reliability(*top_confidence(p), bins)), multiclass_calibration_error(score, torch.from_numpy(p.targets), 5, n_bins=bins).item(), atol=1e-5)
    by_class = classwise_calibration(p, bins).calibration_error
    confidence, correct = probabilities(p)[:, 2], p.targets == 2
    edges = np.linspace(0, 1, bins + 1)
    by_hand = sum(abs((confidence - correct)[(confidence > a) & (confidence <= b)].sum()) for a, b in zip(edges[:-1], edges[1:])) / len(correct)
    assert np.isclose(by_class[2], by_hand, atol=1e-5)


@given(st.integers(0, 10 ** 6))
def test_swapped_pairs_are_found_in_both_directions(seed):
    p = random_predictions(seed=seed)
    c = confusion_matrix(p.targets, p.scores.argmax(1), labels=range(5))
    pairs = swapped_pairs(p, 100)
    expected = {(i, j) for i in range(5) for j in range(5) if i != j and c[i, j] and c[j, i]}
    found = [('abcde'.index(r.true), 'abcde'.index(r.said)) for r in pairs.itertuples()]
    assert set(found) == expected and len(found) == len(expected) and all(c[i, j] == r.images for (i, j), r in zip(found, pairs.itertuples()))
    groups = confusion_groups(p, 0.0)
    assert groups.errors.sum() <= (p.targets != p.scores.argmax(1)).sum() and set(groups.classes.str.split(', ').explode()) == {'abcde'[i] for i, _ in expected}


def test_mirror_counts_and_size_correlation():
    p = random_predictions()
    same = mirror_table(p, p)
    assert (same.agreement == 1).all() and (same.lost == 0).all() and (same.p_value == 1).all()
    with pytest.raises(DataError, match='same images'): mirror_table(p, Predictions(p.scores, p.ids[::-1], p.classes, p.targets))
    table = pd.DataFrame({'train_images': [10, 20, 30], 'support': [5, 5, 0], 'accuracy': [0.5, 0.7, np.nan]})
    assert size_correlation(table) == {'rho': None, 'n': 2}
