"Static int8: the integers against plain arithmetic, calibration in bounded memory, runs from end to end, and errors that come before anything is computed."
import weakref

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from aaai_lt.core import ConfigError, DataError
from aaai_lt.hardware import export, quantize
from aaai_lt.models.zoo import make_model
from aaai_lt.training.config import make_config
from aaai_lt.training.evaluate import run_data
from aaai_lt.training.loop import train
from aaai_lt.training.run import Run

SIZE = 32


def noise(count, seed=0): return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).numpy()


def prepared(model, tmp_path, **inside): return quantize.prepare_float(export.export_onnx(model.eval(), tmp_path/'m.onnx', SIZE, **inside))


def chain(groups=1, activation=nn.ReLU, branch=False):
    "Three convolutions, pooled, and a classifier; on request with a second reader of the first activation."
    class Chain(nn.Module):
        mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=groups), nn.Conv2d(8, 16, 1), nn.Linear(16, 5)
            self.act = activation()
        def forward(self, x):
            first = self.act(self.one(x))
            x = self.act(self.three(self.act(self.two(first))))
            return self.fc(x.mean((2, 3)) + (first.mean((1, 2, 3))[:, None] if branch else 0))
    torch.manual_seed(0)
    return Chain()


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A finished run on digits in a home of its own, with its data."
    home = tmp_path_factory.mktemp('home')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('AAAI_LT_HOME', str(home))
        run = train(make_config(data='digits', model='repvgg_n3', model_options={'widths': [0.25] * 4}, input_size=SIZE, epochs=3, lr=3e-3, standardize=True, device='cpu', name='digits'), say=lambda text: None)
        yield run, run_data(run, progress=False)


@pytest.mark.parametrize('per_channel', [True, False])
def test_one_linear_layer_against_plain_integers(per_channel, tmp_path):
    "uint8 activations with a zero point, symmetric int8 weights, an int32 bias: at most one level of the output away."
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * SIZE * SIZE, 4)
            nn.init.normal_(self.fc.weight, std=0.02)
            with torch.no_grad(): self.fc.weight[2] *= 30
        def forward(self, x): return self.fc(x.flatten(1))
    torch.manual_seed(0)
    model, images = prepared(Flat(), tmp_path), noise(16)
    ranges = quantize.calibrate(model, [images[:8], images[8:]])
    got = quantize.predict_onnx(quantize.quantise(model, ranges, per_channel), [images])
    weights, bias = (onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name.endswith(name))).astype('float64') for name in ('weight', 'bias'))
    def levels(low, high): return (max(high, 0) - min(low, 0)) / 255
    scale = levels(images.min(), images.max())
    zero = round(-min(images.min(), 0) / scale)
    x = np.clip(np.round(images.reshape(16, -1) / scale) + zero, 0, 255) - zero
    step = np.abs(weights).max(axis=1 if per_channel else None, keepdims=True) / 127
    logits = scale * (x @ np.round(weights / step).T) * step.reshape(1, -1) + bias
    exact = images.reshape(16, -1) @ weights.T + bias
    assert np.abs(got - logits).max() <= 1.01 * levels(exact.min(), exact.max())
    assert quantize.relative_error(exact, got) < 0.05


def test_calibration_is_the_same_however_images_are_cut_and_keeps_no_batch(tmp_path):
    model, images, alive = prepared(chain(), tmp_path), noise(24), []
    def batches(size):
        for a in range(0, len(images), size):
            alive.append(sum(r() is not None for r in references[:-1]))
            batch = images[a:a + size].copy()
            references.append(weakref.ref(batch))
            yield batch
    ranges = {}
    for method in quantize.METHODS:
        for size in (4, 24):
            references = []
            ranges[method, size] = quantize.calibrate(model, batches(size), method)
    assert max(alive) == 0  # of the batches before the last
    for name, value in ranges['minmax', 4].data.items(): assert np.allclose(value.range_value, ranges['minmax', 24].data[name].range_value)
    for method in ('entropy', 'percentile'):
        for name, value in ranges[method, 4].data.items():
            low, high = (float(np.squeeze(v)) for v in value.range_value)
            least, most = (float(np.squeeze(v)) for v in ranges['minmax', 4].data[name].range_value)
            assert least - 1e-4 <= low <= high <= most + 1e-4, (method, name)
    source = model.graph.input[0].name
    cut = quantize.calibrate(model, [images], 'percentile', 95).data[source]
    assert np.isclose(float(cut.highest), np.quantile(np.abs(images), 0.95), rtol=0.02)


@pytest.mark.recipes
@pytest.mark.parametrize('name', ['repvgg_m0', 'mobilenetv3_small_050', 'vit_tiny_patch16_224', *(pytest.param(name, marks=pytest.mark.slow) for name in ('resnet10t', 'convnext_atto'))])
def test_families_stay_close_to_float(name, tmp_path):
    torch.manual_seed(0)
    options = {'depth': 2, 'class_token': False, 'global_pool': 'avg'} if name.startswith('vit') else {}  # an untrained class token is too small beside the patches to be seen in 8 bits
    net, images = make_model(name, 7, input_size=SIZE, **options), noise(48)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d): module.momentum = None
        net.train()(torch.from_numpy(images))
    model = quantize.equalised(prepared(net, tmp_path))
    layers = quantize.weighted_layers(model)
    assert len(layers) == len(set(layers)) >= 3 and not any(n.startswith(('backbone', 'model', 'node_')) for n in layers)
    int8 = quantize.quantise(model, quantize.calibrate(model, [images[:24], images[24:]]))
    onnx.checker.check_model(int8, full_check=True)
    one, other = quantize.predict_onnx(model, [images]), quantize.predict_onnx(int8, [images])
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.7  # untrained networks are easily disturbed; a wrong graph has nothing in common


def test_what_stands_before_and_behind_stays_in_float(tmp_path):
    "Standardisation, preprocessing and softmax: no rounding of the picture's mean, none of the probabilities."
    net = make_model('repvgg_n1', 5, standardize=True)
    model = prepared(net, tmp_path, preprocessing='nhwc', activation='softmax')
    pictures = np.random.default_rng(0).integers(0, 256, (12, SIZE, SIZE, 3), dtype='uint8')
    int8 = quantize.quantise(model, quantize.calibrate(model, [pictures]))
    rounded = {n.input[0] for n in int8.graph.node if n.op_type == 'QuantizeLinear'}
    first = next(i for i, n in enumerate(model.graph.node) if n.op_type == 'Conv')
    before = {o for n in model.graph.node[:first] for o in n.output} - {model.graph.node[first].input[0]}
    assert not rounded & before and int8.graph.node[-1].op_type == 'Softmax'
    assert np.allclose(quantize.predict_onnx(int8, [pictures]).sum(1), 1, atol=1e-5)


def test_layers_by_name(tmp_path):
    model = prepared(chain(), tmp_path)
    ranges = quantize.calibrate(model, [noise(8)])
    errors = quantize.layer_errors(model, ranges, [noise(8)])
    assert sorted(errors.layer) == ['fc', 'one', 'three', 'two'] and errors.error.is_monotonic_decreasing
    alone = quantize.quantise(model, ranges, only='two')
    assert [t.name for t in alone.graph.initializer if t.name.endswith('weight_quantized')] == ['two.weight_quantized']
    narrow = quantize.quantise(model, ranges, reduce_range=True)
    assert all(np.abs(onnx.numpy_helper.to_array(t).astype(int)).max() <= 64 for t in narrow.graph.initializer if t.name.endswith('weight_quantized'))
    kept = quantize.quantise(model, ranges, keep_float=('two', 'fc'))
    assert sorted(t.name for t in kept.graph.initializer if t.name.endswith('weight_quantized')) == ['one.weight_quantized', 'three.weight_quantized']
    for options, message in (({'keep_float': ('tow',)}, "no layer 'tow'.*did you mean 'two'"), ({'only': 'four'}, "no layer 'four'")):
        with pytest.raises(ConfigError, match=message): quantize.quantise(model, ranges, **options)
    with pytest.raises(ConfigError, match='no layer can be in int8'): quantize.propose_float(model, ranges, [noise(8)], errors, agreement=1.1)
    keep, tried = quantize.propose_float(model, ranges, [noise(8)], errors, agreement=0.0)
    assert keep == () and len(tried) == 4


@pytest.mark.parametrize('groups', [1, 8])
def test_equalised_is_the_same_function_with_equal_shares(groups, tmp_path):
    net, images = chain(groups), noise(8)
    with torch.no_grad(): net.one.weight[3] *= 100
    model = prepared(net, tmp_path)
    even = quantize.equalised(model)
    one, other = quantize.predict_onnx(model, [images]), quantize.predict_onnx(even, [images])
    assert np.allclose(one, other, atol=1e-4 * np.abs(one).max())
    kernels = {t.name: np.abs(onnx.numpy_helper.to_array(t)) for t in even.graph.initializer}
    writes, reads = kernels['one.weight'].max((1, 2, 3)), kernels['two.weight'].max((0, 2, 3) if groups == 1 else (1, 2, 3))
    assert np.allclose(writes, reads, rtol=1e-3) and len(quantize.chains(model)) == 2


def test_only_plain_chains_are_equalised(tmp_path):
    "Not through another activation, nor where somebody else reads along."
    assert quantize.chains(prepared(chain(activation=nn.ReLU6), tmp_path)) == []
    assert [(a.input[1], b.input[1]) for a, b in quantize.chains(prepared(chain(branch=True), tmp_path))] == [('two.weight', 'three.weight')]
    model = prepared(make_model('resnet10t', 5), tmp_path)
    even = quantize.equalised(model)
    assert np.allclose(quantize.predict_onnx(model, [noise(4)]), quantize.predict_onnx(even, [noise(4)]), atol=1e-4)


def test_report_against_counting():
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1, 2], [50, 30, 5])
    before, after = rng.normal(size=(2, 85, 4))
    report = quantize.int8_report(before, after, targets, 'abcd', [500, 50, 5, 7]).set_index(['kind', 'name'])
    one, other = before.argmax(1), after.argmax(1)
    assert np.isclose(report.float['overall', 'accuracy'], (one == targets).mean()) and np.isclose(report.int8['overall', 'accuracy'], (other == targets).mean())
    by_class = [(other[targets == c] == c).mean() for c in range(3)]
    assert np.isclose(report.int8['overall', 'balanced_accuracy'], np.mean(by_class)) and np.allclose(report.int8['class'][:3], by_class) and np.isnan(report.int8['class', 'd'])
    assert np.isclose(report.agreement['overall', 'accuracy'], (one == other).mean()) and np.isclose(report.agreement['band', 'few'], (one == other)[80:].mean())
    assert report.images['band'].to_dict() == {'many': 50, 'medium': 30, 'few': 5}


@pytest.mark.parametrize('inside', [{}, {'preprocessing': 'nchw', 'activation': True}])
def test_a_run_from_end_to_end(finished, inside):
    run, data = finished
    export.export_run(run, data.table, 21, **inside)
    report = quantize.quantize_run(run, data, images=100, split='test').set_index(['kind', 'name'])
    summary = run.summary['test']
    assert np.isclose(report.float['overall', 'accuracy'], summary['accuracy'], atol=2e-3) and np.isclose(report.float['overall', 'balanced_accuracy'], summary['balanced_accuracy'], atol=2e-3)
    assert report.images['overall', 'accuracy'] == summary['images'] and len(report.loc['class']) == 10
    meta = export.read_metadata(run.folder/'model.int8.onnx')
    assert meta['classes'] == run.data['classes'] and 'per channel, minmax, 100 training images' in meta['quantisation'] and meta['keep_float'] == [] and meta['input'] == export.INPUTS[inside.get('preprocessing', '')]
    assert (run.folder/'int8.csv').is_file() and (run.folder/'model.int8.onnx').stat().st_size < 0.4 * (run.folder/'model.onnx').stat().st_size
    pictures = export.run_images(run, data.table, 'test', 50, inside.get('preprocessing', '')).numpy()
    assert (quantize.predict_onnx(run.folder/'model.int8.onnx', [pictures]).argmax(1) == quantize.predict_onnx(run.folder/'model.onnx', [pictures]).argmax(1)).mean() > 0.5


@pytest.mark.parametrize('activation', [False, True])
def test_several_labels_from_end_to_end(finished, activation):
    "Average precision and labels against scikit-learn and counting; with a sigmoid inside, one half is the probability."
    from sklearn.metrics import average_precision_score
    run = train(make_config(data='digits-mosaic:0.1', quick=True, batch_size=16, name='mosaic', device='cpu'), say=lambda text: None)  # in the fixture's home; finished the second time
    data = run_data(run, progress=False)
    export.export_run(run, data.table, 21, activation=activation)
    report, part = quantize.quantize_run(run, data, images=64, split='test', keep_float='propose').set_index(['kind', 'name']), data.splits['test']
    before, after = (quantize.predict_onnx(run.folder/name, quantize.image_batches(data, part.rows, run.data)) for name in ('model.onnx', 'model.int8.onnx'))
    said, half = [scores >= (0.5 if activation else 0) for scores in (before, after)], run.summary['test']
    assert np.isclose(report.float['overall', 'mAP'], half['mAP'], atol=1e-3) and np.isclose(report.float['overall', 'OF1'], half['OF1'], atol=1e-3)
    assert np.isclose(report.int8['overall', 'mAP'], average_precision_score(part.labels, after, average='macro'))
    assert all((report.taken['class', name], report.given['class', name]) == ((said[0] & ~said[1])[:, c].sum(), (said[1] & ~said[0])[:, c].sum()) for c, name in enumerate(data.table.classes))
    assert np.isclose(report.agreement['overall', 'mAP'], 2 * (said[0] & said[1]).sum() / (said[0].sum() + said[1].sum())) and report.agreement['overall', 'mAP'] > 0.9


def test_a_layer_that_moves_a_class_is_to_blame(tmp_path):
    "A shift of one label for all images is an error with several labels, and harmless to the order of one."
    expected = np.random.default_rng(0).normal(size=(50, 4))
    alike, one = expected + 1, expected + [2, 0, 0, 0]
    assert quantize.change_of_scores(expected, alike)[0] < 1e-12 < 0.5 < quantize.change_of_scores(expected, alike, multilabel=True)[0]
    assert quantize.change_of_scores(expected, one, multilabel=True)[1] == quantize.same_labels(expected >= 0, one >= 0) < 1
    assert quantize.change_of_scores(expected, expected, multilabel=True) == (0, 1) and quantize.change_of_scores(expected - 99, expected - 98, multilabel=True)[1] == 1  # nothing is said by either


def test_the_profile_of_a_run_with_several_labels(finished):
    from test_evaluate import execute
    run = train(make_config(data='digits-mosaic:0.1', quick=True, batch_size=16, name='mosaic', device='cpu'), say=lambda text: None)
    space, printed = execute('profile.ipynb', run='mosaic', models=['repvgg_n1'], pictures=1, time_here=False, max_macs=40.0)
    assert {'mAP', 'OF1'} <= set(space['int8'].name) and (run.folder/'int8.csv').is_file() and 'int8.csv' in printed and 'model.int8.onnx' in printed


def test_an_old_export_is_not_taken_for_the_run(finished):
    run, data = finished
    export.export_run(run, data.table, 21)
    old = onnx.load(run.folder/'model.onnx')
    export.write_metadata(old, export.read_metadata(run.folder/'model.onnx') | {'weights_sha256': 'of something else'})
    onnx.save(old, run.folder/'model.onnx')
    assert export.read_metadata(quantize.float_file(run, data.table))['weights_sha256'] != 'of something else'


def test_errors_come_first(finished, tmp_path):
    run, data = finished
    for wrong, kind, message in (({'method': 'minmix'}, ConfigError, "did you mean 'minmax'"), ({'images': 0}, ConfigError, 'whole number of at least 1'), ({'images': 2.5}, ConfigError, 'whole number'),
                                 ({'split': 'tset'}, DataError, "did you mean 'test'"), ({'method': 'percentile', 'percentile': 40, 'images': 4}, ConfigError, 'percentile is 40')):
        with pytest.raises(kind, match=message): quantize.quantize_run(run, data, **wrong)
    with pytest.raises(DataError, match='no training images'):
        import dataclasses
        quantize.quantize_run(run, dataclasses.replace(data, splits={'test': data.splits['test']}))
    unfinished = tmp_path/'begun'
    unfinished.mkdir()
    (unfinished/'config.yaml').write_text((run.folder/'config.yaml').read_text())
    with pytest.raises(ConfigError, match='begun is not finished'): quantize.quantize_run(Run(unfinished))
    with pytest.raises(FileNotFoundError, match="no run 'digitz'"): quantize.quantize_run('digitz')
