"Costs against torch's own counter, against the published tables, against hand counts, and against the same model as an ONNX file."
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from aaai_lt import core
from aaai_lt.core import ConfigError, DataError
from aaai_lt.hardware import cost as cost_room
from aaai_lt.hardware.cost import cost, flops, model_names, totals
from aaai_lt.hardware.devices import published_latency, rank_correlations, read_latency
from aaai_lt.hardware.export import export_onnx
from aaai_lt.hardware.fit import count_repvgg, draw_networks, front, search_fit
from aaai_lt.hardware.graph import empty_copy, empty_model, read_graph, record
from aaai_lt.hardware.memory import fits, liveness, model_row, peak, published_table
from aaai_lt.models.zoo import make_model

FAMILIES = {'resnet18': 224, 'resnext50_32x4d': 224, 'seresnet50': 224, 'regnety_008': 224, 'densenet121': 224, 'efficientnet_b0': 224, 'mobilenetv2_100': 224, 'mobilenetv3_large_100': 224, 'mobilenetv4_conv_small': 224,
    'vit_tiny_patch16_224': 224, 'deit3_small_patch16_224': 224, 'swin_tiny_patch4_window7_224': 224, 'visformer_tiny': 224, 'convnext_atto': 224, 'repvgg_a0': 112, 'ghostnet_100': 224, 'tresnet_m': 224, 'vgg11': 224, 'dpn68': 224,
    'hrnet_w18_small': 224, 'mixer_b16_224': 224, 'coatnet_0_rw_224': 224, 'crossvit_9_240': 240, 'beit_base_patch16_224': 224, 'poolformer_s12': 224, 'pvt_v2_b0': 224, 'mobilevit_xxs': 256, 'levit_128s': 224, 'resnetv2_50': 224,
    'res2net50_26w_4s': 224, 'volo_d1_224': 224, 'davit_tiny': 224, 'focalnet_tiny_srf': 224, 'halonet26t': 256, 'test_resnet': 160}


def torch_macs(model, size):
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(torch.empty(1, 3, size, size, device='meta'))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize('name', FAMILIES)
def test_families(name):
    "Multiply-adds as torch counts them, every parameter once; the shipping form never has more of either."
    model = empty_model(name, 10, FAMILIES[name])
    rows, shipped = cost(model, FAMILIES[name], deploy=False), cost(model, FAMILIES[name])
    assert rows.macs.sum() == torch_macs(model, FAMILIES[name])
    assert rows.parameters.sum() == sum(p.numel() for p in model.parameters())
    assert shipped.parameters.sum() <= rows.parameters.sum() and shipped.macs.sum() <= rows.macs.sum()
    assert (rows.kind != 'uncounted').all() and rows.layer.is_unique


def test_products_of_weights_alone_are_not_counted():
    "What EdgeNeXt computes from its positional code alone is a constant by the time it ships; torch's counter sees it."
    model = empty_model('edgenext_xx_small', 10, 256)
    code = model.backbone.stages[1].blocks[-1].pos_embd.token_projection  # 1 × 1 convolution of 64 sines and cosines on the 32 × 32 map
    assert torch_macs(model, 256) - cost(model, 256, deploy=False).macs.sum() == code.weight.numel() * 32 * 32


class Odd(nn.Module):
    "Layers that classifiers of images seldom have."
    def __init__(self):
        super().__init__()
        self.depthwise, self.grouped, self.up = nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 12, 5, groups=3, padding=2), nn.ConvTranspose2d(12, 8, 4, stride=2, groups=2)
        self.table, self.attention, self.out = nn.Embedding(40, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)
    def forward(self, x):
        x = self.up(self.grouped(self.depthwise(x)))
        tokens = x.flatten(2).transpose(1, 2) + self.table((x[:, 0].flatten(1) * 0).long())
        tokens = self.out(self.out(self.attention(tokens, tokens, tokens, need_weights=False)[0]))  # the same layer twice
        return F.scaled_dot_product_attention(tokens, tokens, tokens).mean(1)


def test_odd_layers_by_hand():
    rows = cost(Odd(), 8).set_index('layer')
    n = 14 * 14  # tokens: 8 - 2 = 6, transposed 6 · 2 + 2 = 14
    assert rows.macs[['depthwise', 'grouped', 'up']].tolist() == [6 * 36 * 9, 12 * 36 * 2 * 25, 12 * 36 * 4 * 16]
    assert rows.kind[['depthwise', 'grouped', 'up', 'table']].tolist() == ['depthwise', 'grouped', 'transposed', 'embedding']
    assert rows.macs['table'] == 0 and rows.parameters['table'] == 320 == rows.weight_bytes['table']
    assert rows[rows.kind == 'matmul'].macs.tolist() == [n * n * 8] * 4  # two products in each of two attentions
    assert rows[rows.kind == 'linear'].macs.tolist() == [n * 8 * 24, n * 8 * 8, n * 8 * 8, n * 8 * 8]
    assert rows.parameters[['out', 'out_1']].tolist() == [72, 0] and rows.weight_bytes[['out', 'out_1']].tolist() == [64, 64]
    assert rows.parameters.sum() == sum(p.numel() for p in Odd().parameters())


def check_published(rows):
    "All eight rows: parameters and memory to the byte, the layer, and the printed FLOPs by their rule."
    printed = core.table('aaai_model_table').set_index('model')
    for name, p in printed.iterrows():
        row = rows.loc[name]
        assert (row.parameters, row['memory KiB'] * 1024, row['multiply-adds']) == (p.params_deploy, p.max_mem_bytes, p.macs_std_112), name
        stage, _, conv = p.max_mem_layer_computed.partition('.')
        assert row.layer == ('stem' if stage == 'stage0' else f'stages.{int(stage[5:]) - 1}.{conv}'), name
        assert f'{row["by the printed rule"] / 1e6:.3f}M' == p.flops_reproduced, name


def test_published_table(): check_published(published_table())


def test_published_flops_to_the_digit():
    exact = {'a0': 202_337_216, 'n0': 268_466_432, 'n1': 67_116_608, 'n2': 134_233_216, 'n3': 67_539_776, 'n4': 134_515_328, 'm0': 252_955_904, 'm1': 191_220_416}
    assert {name: flops(cost(f'repvgg_{name}', 112, 89), 'thop_unbatched').sum() for name in exact} == exact


@pytest.mark.parametrize('variant', core.table('aaai_model_table').model)
def test_training_form_and_larger_input(variant):
    printed = core.table('aaai_model_table').set_index('model').loc[variant]
    assert cost(f'repvgg_{variant.lower()}', 112, 89, deploy=False).parameters.sum() == printed.params_train_form
    assert cost(f'repvgg_{variant.lower()}', 224, 89).macs.sum() == printed.macs_std_224


def test_every_printed_layer_of_a0():
    rows = cost('repvgg_a0', 112, 89)
    expected = {'stem': 753_984, 'stages.0.0': 208_944, 'stages.0.1': 208_944, 'stages.1.0': 135_648, 'stages.2.0': 213_120, 'stages.3.0': 2_315_520} | {f'stages.1.{i}': 177_120 for i in (1, 2, 3)} | {f'stages.2.{i}': 379_008 for i in range(1, 14)}
    memory = rows.set_index(rows.layer.str.removesuffix('.reparam_conv')).memory_bytes
    assert {name: memory[name] for name in expected} == expected and memory['head.fc'] == 114_454 and len(rows) == 22 + 2


def test_wrong_rules_are_seen(monkeypatch):
    "The check of the published table fails if the bias or the counter is off."
    real = cost_room.memory_columns
    monkeypatch.setattr(cost_room, 'memory_columns', lambda rows, bias_bits=8, **o: real(rows, bias_bits=32, **o))
    with pytest.raises(AssertionError): check_published(published_table())
    monkeypatch.undo()
    monkeypatch.setitem(cost_room.FLOPS_RULES, 'thop_unbatched', lambda row: row.macs)
    with pytest.raises(AssertionError): check_published(published_table())


def test_memory_options():
    plain = cost('repvgg_n1', 64, 10)
    def of(**options): return cost('repvgg_n1', 64, 10, **options).memory_bytes
    layers = plain[plain.macs > 0]
    assert (of(bias_bits=32) - plain.memory_bytes).equals(3 * plain.bias_bytes)
    assert (of(include_input=True) - plain.memory_bytes)[0] == 3 * 64 * 64
    assert (of(double_buffer=True) - plain.memory_bytes)[0] == plain.weight_bytes[1] + plain.bias_bytes[1] and of(double_buffer=True).iloc[-1] == plain.memory_bytes.iloc[-1]
    assert (plain.memory_bytes - of(weight_bits=4))[layers.index].equals(layers.weight_bytes - -(-layers.weight_bytes // 2))
    assert (of(activation_bits=16) - plain.memory_bytes).equals(plain.activation_bytes)
    assert totals(plain, '').iloc[0][['macs', 'parameters', 'memory_bytes']].tolist() == [plain.macs.sum(), plain.parameters.sum(), plain.memory_bytes.max()]


@pytest.mark.recipes
@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv2_050', 'vit_tiny_patch16_224'])
def test_onnx_has_the_same_rows(tmp_path, name):
    model = make_model(name, 7, input_size=64)
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point(): t.uniform_(0.5, 1.5)  # the exporter stores equal tensors once
    file = export_onnx(model, tmp_path/'m.onnx', 64)
    there, here = cost(file, 64), cost(model, 64)
    columns = ['kind', 'output_shape', 'macs', 'parameters', 'weight_bytes', 'bias_bytes', 'accumulator_bytes', 'activation_bytes', 'memory_bytes']
    pd.testing.assert_frame_equal(*(rows.loc[rows.macs > 0, columns].reset_index(drop=True) for rows in (there, here)))
    assert there.parameters.sum() == here.parameters.sum()
    if 'vit' not in name: assert peak(liveness(file, 64)).alive_bytes == peak(liveness(model, 64)).alive_bytes  # its GELU is several nodes


def test_mobilenet_peaks():
    graph = read_graph('mobilenetv2_100', 224)
    plain, in_place = peak(liveness(graph)), peak(liveness(graph, in_place='depthwise'))
    assert (plain.alive_bytes, plain.layer) == (1470 * 1024, 'blocks.1.0.conv_dw') and in_place.alive_bytes == 1372 * 1024


class Branches(nn.Module):
    "A skip over a pre-activation block with a concatenation; `style` writes the same sum in three ways."
    def __init__(self, style):
        super().__init__()
        self.style, self.norm, self.conv, self.pool = style, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2)
    def forward(self, x):
        x = F.pad(x, (0, 0, 0, 0, 0, 1))  # to 4 channels
        y = self.conv(self.norm(x).relu())
        if self.style == 'new': x = x + y
        elif self.style == 'in place': x += y
        else: torch.add(x, y, out=(z := torch.empty_like(x))); x = z
        return self.pool(torch.cat([x, y], 1))


@pytest.mark.parametrize('style', ['new', 'in place', 'out'])
def test_liveness_by_hand(style):
    "On 8 × 8 pixels a map of 4 channels is 256 bytes. x waits for the sum, so the normalisation needs a place of its own; its ReLU does not."
    table = liveness(record(empty_copy(Branches(style)), (1, 3, 8, 8)))
    assert list(table.kind) == ['copy', 'normalisation', 'convolution', 'elementwise', 'copy', 'pool']
    assert list(table.alive_bytes) == [192 + 256, 256 + 256, 256 + 256 + 256, 256 + 256 + 256, 256 + 256 + 512, 512 + 128]


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=6), st.integers(4, 9))
def test_liveness_of_random_residual_chains(layers, size):
    "Against a simulation that keeps tensors in a set and drops each after its last use."
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            channels = [3, *(c for c, _ in layers)]
            self.one = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(channels, channels[1:]))
            self.two = nn.ModuleList(nn.Conv2d(b, b, 3, padding=1) for b in channels[1:])
        def forward(self, x):
            for one, two, (_, skip) in zip(self.one, self.two, layers):
                x = one(x).relu()
                x = x + two(x) if skip else two(x)
            return x
    expected, before, area = [], 3, size * size
    for c, skip in layers:
        expected += [(before + c) * area, 2 * c * area] + ([3 * c * area] if skip else [])
        before = c
    assert list(liveness(record(empty_copy(Chain()), (1, 3, size, size))).alive_bytes) == expected


def test_counting_takes_no_memory_and_leaves_the_model_alone():
    script = '''
import resource, torch
from aaai_lt.hardware.memory import model_row
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
row = model_row('vit_large_patch16_224', 224)
print(row['parameters'], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)'''
    parameters, grown = map(int, subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout.split())
    assert parameters == 304_326_632 and grown < 200  # MiB; its weights would be 1,161
    model = make_model('test_resnet', 5).train()
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    cost(model, 32)
    assert all(torch.equal(v, state[k]) and v.device.type == 'cpu' for k, v in model.state_dict().items()) and [m.training for m in model.modules()] == modes
    assert not torch.nn.modules.module._global_forward_hooks and not torch.nn.modules.module._global_forward_pre_hooks


def test_fits():
    table = fits('mobilenetv2_100', 224, chip_kib=1400).set_index('change')
    assert not table.fits['as it is'] and table.fits['depthwise layers in place'] and table.over_kib['as it is'] == 70 and table.keep['as it is'] == round(1400 / 1470, 3)
    assert table.fits.iloc[-1] and table.index[-1] == 'input of 216 pixels'
    assert fits('repvgg_n1', 112, 89, chip_kib=1024).iloc[0].fits


@pytest.mark.parametrize('call, message', [
    (lambda: cost('repvgg_a9'), "did you mean 'repvgg_"), (lambda: cost('repvgg_a0', 0), 'input_size is 0'), (lambda: cost('repvgg_a0', '112'), 'input_size'), (lambda: cost(7), 'a name, a torch model'),
    (lambda: cost('repvgg_n1', 32, 3, weight_bits=0), 'weight_bits is 0'), (lambda: flops(cost('repvgg_n1', 32, 3), 'thop'), 'thop_unbatched'), (lambda: totals(cost('repvgg_n1', 32, 3), 'stag'), "did you mean 'stage'"),
    (lambda: liveness('repvgg_n1', 32, 3, in_place='depth'), 'in_place'), (lambda: fits('repvgg_n1', 32, 3, chip_kib=0), 'chip_kib'), (lambda: fits('repvgg_n1', 32, 3, rule='seed'), 'rule'),
    (lambda: cost(nn.Linear(7, 3), 32), 'Linear does not run'), (lambda: model_names('{a: 1}'), 'a list of names'), (lambda: model_names([1]), 'a list of names'), (lambda: search_fit(device='Atari'), 'device'), (lambda: front(pd.DataFrame({'a': [1]})), 'memory_bytes'),
])
def test_errors(call, message):
    with pytest.raises(ConfigError, match=message): call()


def test_onnx_errors(tmp_path):
    (tmp_path/'bad.onnx').write_bytes(b'no model')
    with pytest.raises(DataError, match='bad.onnx'): cost(tmp_path/'bad.onnx', 32)
    with pytest.raises(FileNotFoundError, match='none.onnx'): cost(str(tmp_path/'none.onnx'), 32)


@pytest.mark.parametrize('text, message', [
    ('model,latency_ms\nA0,1\n', "no column 'device'"), ('device,model,latency_ms\n', 'no rows'), ('device,model,latency_ms\nb,A0,1\nb,A0,2\n', 'row 3: the same'), ('device,model,latency_ms\nb,A0,fast\n', 'row 2: latency_ms is not a number'),
    ('device,model,latency_ms\nb,A0,-1\n', 'above 0'), ('device,model,latency_ms\nb,A0,\n', 'status must be'), ('device,model,latency_ms,status\nb,A0,1,failure\n', 'contradict'), ('device,model,latency_ms\nb,A0,1\nb,repvgg_z9,2\n', "row 3: model 'repvgg_z9'"),
    ('device,model,latency_ms\nb,,1\n', 'blank'), ('', 'not a CSV'),
])
def test_bad_device_rows(tmp_path, text, message):
    (tmp_path/'mine.csv').write_text(text)
    with pytest.raises(DataError, match=message) as error: read_latency(tmp_path/'mine.csv')
    assert 'mine.csv' in str(error.value)


def test_own_device_rows(tmp_path):
    "Times that are the multiply-adds themselves rank with them perfectly; a failure and a blank are kept."
    names = ['A0', 'repvgg_n0', 'N1', 'N2']
    times = [f'{row["macs"] / 1e6}' for row in (model_row(f'repvgg_{n[-2:].lower()}', 112, 89) for n in names)]
    (tmp_path/'mine.csv').write_text('device,precision,model,latency_ms,status,batch\n' + ''.join(f'board,int8,{n},{t},,1\n' for n, t in zip(names, times)) + 'board,int8,M1,,failure,1\nboard,int8,resnet18,,not_measured,1\n')
    rows = read_latency(tmp_path/'mine.csv')
    assert rows.model.tolist() == ['A0', 'N0', 'N1', 'N2', 'M1', 'resnet18'] and rows.status.tolist() == ['ok'] * 4 + ['failure', 'not_measured'] and rows.batch.tolist() == [1] * 6
    table = rank_correlations(pd.concat([published_latency(), rows]))
    assert table.loc['board (int8)', 'n'] == 4 and table.loc['board (int8)', 'multiply-adds'] == 1


@pytest.mark.parametrize('size, classes', [(112, 89), (33, 5), (224, 1000)])
def test_closed_form_is_cost(size, classes):
    blocks, widths = draw_networks(4, seed=size)
    for row, b, w in zip(count_repvgg(blocks, widths, size, classes).to_dict('records'), blocks, widths):
        exact = model_row('repvgg_n0', size, classes, model_options={'blocks': tuple(map(int, b)), 'widths': tuple(map(float, w))})
        assert row == {key: exact[key] for key in row}


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=40))
def test_front_by_definition(points):
    table = pd.DataFrame(points, columns=['memory_bytes', 'macs', 'parameters'])
    signed = table.to_numpy() * [1, -1, -1]
    beaten = np.array([any((q <= p).all() and (q < p).any() for q in signed) for p in signed])
    best = front(table)
    assert not (best & beaten).any() and {tuple(p) for p in signed[best]} == {tuple(p) for p in signed[~beaten]} and not table[best].duplicated().any()


def test_a_run_that_standardises_is_counted_with_it(home):
    "What stands before the network in the exported file stands in its graph too."
    from aaai_lt.hardware.graph import run_graph
    from aaai_lt.training.config import make_config, to_yaml
    from aaai_lt.training.run import Run
    steps = {}
    for standardize in (False, True):
        folder = home/'outputs'/f'run-{standardize}'
        folder.mkdir(parents=True)
        (folder/'config.yaml').write_text(to_yaml(make_config(data='digits', standardize=standardize)))
        (folder/'data.json').write_text(json.dumps({'input_size': 48, 'classes': list('0123456789')}))
        steps[standardize] = run_graph(Run(folder)).steps
    assert sum(s.macs for s in steps[True]) == sum(s.macs for s in steps[False])
    assert len(steps[True]) > len(steps[False]) and any(s.output_shape == (3, 48, 48) for s in steps[True])


def test_profile_notebook(home):
    "As its users start it: the issue's list of models as text, a run, own rows; then a setting that is none of its own."
    from test_train import papermill

    from aaai_lt.training.config import make_config, to_yaml
    folder = home/'outputs'/'mine'
    folder.mkdir(parents=True)
    (folder/'config.yaml').write_text(to_yaml(make_config(data='digits', head='cosine')))  # it has only begun: its cost is known, int8 and latency are not
    (folder/'data.json').write_text(json.dumps({'input_size': 48, 'classes': list('0123456789')}))
    (home/'mine.csv').write_text('device,model,latency_ms\nboard of mine,A0,12.5\n')
    code, output = papermill(home, 'profile.ipynb', '-p', 'models', '["repvgg_n1"]', '-p', 'run', 'mine', '-p', 'chip_kib', '256', '-p', 'device_rows', str(home/'mine.csv'), '-p', 'pictures', '1')
    assert code == 0, output[-3000:]
    assert 'board of mine' in (home/'out.ipynb').read_text()
    rows = pd.read_csv(folder/'cost.csv')
    assert rows.macs.sum() > 0 and rows.layer.is_unique and not rows.memory_bytes.isna().any()
    assert 'nothing is quantised' in (home/'out.ipynb').read_text() and 'nothing is measured' in (home/'out.ipynb').read_text()
    code, output = papermill(home, 'profile.ipynb', '-p', 'epochs', '3')
    assert code != 0 and "unknown parameter 'epochs'" in output


@pytest.mark.recipes
def test_profile_of_a_finished_run(home):
    "What int8 did to the run, and its latency on this machine."
    from test_train import papermill

    from aaai_lt.training.config import make_config
    from aaai_lt.training.loop import train
    run = train(make_config(data='digits', quick=True, model='test_resnet', input_size=32, name='mine'), say=lambda text: None)
    code, output = papermill(home, 'profile.ipynb', '-p', 'models', '[]', '-p', 'run', 'mine', '-p', 'pictures', '1')
    assert code == 0, output[-3000:]
    int8, times = pd.read_csv(run.folder/'int8.csv'), pd.read_csv(run.folder/'latency.csv')
    assert int8[int8.name == 'balanced_accuracy'].float.item() == pytest.approx(run.summary['val']['balanced_accuracy']) and (run.folder/'model.int8.onnx').is_file()
    assert (times[times.backend == 'onnxruntime int8'].latency_ms > 0).all() and 'outputs/mine/latency.csv' in (home/'out.ipynb').read_text()
