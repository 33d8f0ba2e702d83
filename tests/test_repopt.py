"RepOpt: counts, scales and their files, the two optimizers against their formulas and against the branches they stand for, and runs in stages that are killed and go on."
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers import check_same_run, content
from test_faults import SETTINGS, after, check_resumes, quiet
from test_models import Canary
from test_repvgg import check_folded, shaken
from torch import nn
from torch.nn import functional as F

from aaai_lt.core import ConfigError, Stopped
from aaai_lt.models import repopt, zoo
from aaai_lt.models.repopt import RepOptBlock, apply_scales, extract_scales, multiply_updates, read_scales, repopt_blocks, save_scales
from aaai_lt.training import loop
from aaai_lt.training.config import make_config
from aaai_lt.training.loop import make_optimizer
from aaai_lt.training.run import Run
from aaai_lt.training.stages import find_scales, stage_configs


# -- the networks

@pytest.mark.parametrize('name, classes, count', [  # computed independently from the authors' definitions
    ('repopt_b1', 1000, 51_841_832), ('repopt_b2', 1000, 80_330_536), ('repopt_l1', 1000, 76_037_928), ('repopt_l2', 1000, 118_132_776), ('repopt_b1_hs', 1000, 57_405_672),
    ('repopt_b1_csla', 1000, 57_380_968), ('repopt_b1_repvgg', 1000, 57_415_016), ('repopt_a0', 1000, 8_313_880), ('repopt_a0_hs', 1000, 9_106_136), ('repopt_a0_repvgg', 1000, 9_108_968),
    ('repopt_a0', 89, 7_146_889), ('repopt_n0', 89, 9_789_081)])
def test_counts(name, classes, count):
    with torch.device('meta'): assert sum(p.numel() for p in timm.create_model(name, num_classes=classes).parameters()) == count


@pytest.mark.parametrize('variant, vectors, blocks', [('a0', 61, 22), ('b1', 79, 28), ('b2', 79, 28), ('l1', 139, 48), ('l2', 139, 48)])
def test_vectors_of_the_released_files(variant, vectors, blocks):
    model = timm.create_model(f'repopt_{variant}_hs', num_classes=2, widths=(0.125,) * 4)
    scales = extract_scales(model.state_dict())
    assert len(scales) == vectors and len(repopt_blocks(model)) == blocks and all(v.dtype == torch.float32 for v in scales.values())
    assert list(scales)[:7] == ['stage0.scale_1x1.weight', 'stage0.scale_conv.weight', 'stage1.0.scale_1x1.weight', 'stage1.0.scale_conv.weight', 'stage1.1.scale_identity.weight', 'stage1.1.scale_1x1.weight', 'stage1.1.scale_conv.weight']


class Branches(nn.Module):
    "The block as the paper draws it: convolutions of their own, vectors in front of their sum."
    def __init__(self, block):
        super().__init__()
        self.conv, self.conv_1x1, self.bn = block.conv, nn.Conv2d(block.conv.in_channels, block.conv.out_channels, 1, block.conv.stride, bias=False), block.bn
        self.conv_1x1.weight = block.conv_1x1.weight
        self.a3, self.a1, self.ai = block.scales()

    def forward(self, x):
        y = self.a3.view(-1, 1, 1) * self.conv(x) + self.a1.view(-1, 1, 1) * self.conv_1x1(x)
        return F.relu(self.bn(y if self.ai is None else y + self.ai.view(-1, 1, 1) * x))


@pytest.mark.parametrize('index', [0, 1])
def test_block_with_branches(index):
    "Output and every gradient, the scales' among them."
    torch.manual_seed(0)
    block = timm.create_model('repopt_n1_hs', num_classes=2).double().stages[1][index]
    for p in block.parameters(): nn.init.normal_(p)
    drawn, x = Branches(block), torch.randn(3, block.conv.in_channels, 9, 9, dtype=torch.float64)
    parameters, weights = list(block.parameters()), torch.randn(1, block.conv.out_channels, 1, 1, dtype=torch.float64)
    results = [(out := f(x), torch.autograd.grad((out * weights).square().sum(), parameters)) for f in (block, drawn)]
    assert torch.allclose(results[0][0], results[1][0]) and len(parameters) == (7 if index else 6)
    assert all(torch.allclose(a, b) for a, b in zip(results[0][1], results[1][1]))


AS_THEY_ARE = ('a0', 'n1', 'n3', 'n4', 'm0', 's0')  # the others are too large for a quick test, and are made narrow

@pytest.mark.parametrize('name', [name for name, (variant, mode) in repopt.NAMES.items() if mode != 'repvgg'])
def test_every_mode_folds(name):
    torch.manual_seed(0)
    model = zoo.make_model(name, 11, **{} if repopt.NAMES[name][0] in AS_THEY_ARE else {'widths': (0.125,) * 4}).double()
    for block in repopt_blocks(model): [nn.init.uniform_(s, -1.5, 1.5) for s in block.scales() if s is not None]
    check_folded(shaken(model), 1e-9)


@pytest.mark.parametrize('name', ['repopt_n1', 'repopt_n1_hs'])
def test_export(name, tmp_path):
    from aaai_lt.hardware.export import check_export, compare, export_onnx
    torch.manual_seed(0)
    model = shaken(zoo.make_model(name, 5))
    comparison = compare(model, export_onnx(model, tmp_path/'m.onnx', 32), torch.rand(14, 3, 32, 32))
    check_export(comparison)
    import onnx
    assert {node.op_type for node in onnx.load(tmp_path/'m.onnx').graph.node} <= {'Conv', 'Relu', 'ReduceMean', 'GlobalAveragePool', 'Flatten', 'Reshape', 'Gemm', 'Identity'}


def test_what_repopt_is_not_defined_for():
    with pytest.raises(ConfigError, match='drop path'): zoo.make_model('repopt_n1', 3, drop_path_rate=0.1)
    with pytest.raises(ConfigError, match='dilation'): zoo.make_model('repopt_n1', 3, output_stride=8)


# -- files of scales

@pytest.fixture
def scales():
    torch.manual_seed(0)
    return {n: torch.randn_like(v) for n, v in extract_scales(timm.create_model('repopt_n1_hs', num_classes=100).state_dict()).items()}


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_scales_travel(scales, tmp_path, suffix):
    "From a search over 100 classes through a file into a target of 89."
    save_scales(scales, tmp_path/f's.{suffix}')
    target = zoo.make_model('repopt_n1', 89)
    apply_scales(target, read_scales(tmp_path/f's.{suffix}'))
    again = extract_scales(target.state_dict())
    assert again.keys() == scales.keys() and all(torch.equal(again[n], v) for n, v in scales.items())
    assert extract_scales(target.backbone.state_dict()).keys() == scales.keys()
    block = target.backbone.stages[2][3]
    assert torch.equal(block.scale_conv.weight, scales['stage3.3.scale_conv.weight']) and torch.equal(block.scale_identity.weight, scales['stage3.3.scale_identity.weight']) and torch.equal(target.backbone.stem.scale_1x1.weight, scales['stage0.scale_1x1.weight'])


def test_kernels_begin_by_the_rule():
    "scale_conv · the fresh kernel + scale_1x1 · a fresh 1 × 1 kernel at the centre + scale_identity on its diagonal."
    torch.manual_seed(0)
    model = timm.create_model('repopt_n1', num_classes=2)
    given = {n: torch.randn_like(v) for n, v in extract_scales(model.state_dict()).items()}
    before = {n: p.clone() for n, p in model.named_parameters()}
    apply_scales(model, given)
    block, old = model.stages[1][2], before['stages.1.2.conv.weight']
    a3, a1, ai = (given[f'stage2.2.scale_{kind}.weight'] for kind in ('conv', '1x1', 'identity'))
    rest = block.conv.weight.detach() - a3.view(-1, 1, 1, 1) * old
    assert rest[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]].abs().max() < 1e-6
    fresh = (rest[:, :, 1, 1] - ai.diag()) / a1.view(-1, 1)
    bound = block.conv.in_channels ** -0.5  # of torch's default 1 × 1 kernel
    assert fresh.abs().max() <= bound * 1.01 and fresh.abs().max() > 0.9 * bound and abs(fresh.mean()) < bound / 5
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if not n.endswith('.conv.weight'))
    assert all((b.bn.weight == 1).all() for b in repopt_blocks(model))


def test_scales_that_do_not_fit_change_nothing(scales):
    for name, wrong, message in [('repopt_m0', scales, '61 vectors for 22 blocks are given, the model has 22 for 9; it needs stage4.1.scale_identity.weight'), ('repopt_n2', scales, 'stage0.scale_1x1.weight has 16 values, the block 32 channels'),
                                 ('repopt_n1', {n: v for n, v in scales.items() if n != 'stage3.4.scale_conv.weight'}, 'needs stage3.4.scale_conv.weight'), ('repopt_n1', scales | {'stage4.1.scale_conv.weight': torch.ones(128)}, 'has no stage4.1'),
                                 ('repvgg_n1', scales, 'this model is none'), ('resnet10t', None, 'this model is none')]:
        model = zoo.make_model(name, 3)
        before = {n: v.clone() for n, v in model.state_dict().items()}
        with pytest.raises(ConfigError, match=message): apply_scales(model, wrong)
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_scales_for_a_target_with_gammas(scales):
    "Refused, and nothing is changed; a search is not a target, and kernels that have begun keep their BN."
    for kind in ('stem', 'stages.2.4'):
        model = zoo.make_model('repopt_n1', 3)
        model.get_submodule(f'backbone.{kind}').bn.weight.data[5] = 0.3
        before = {n: v.clone() for n, v in model.state_dict().items()}
        with pytest.raises(ConfigError, match=f'those of backbone.{kind} lie from 0.3 to 1'): apply_scales(model, scales)
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
        apply_scales(model, scales, kernels=False)
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if '.scale_' not in n) and torch.equal(model.backbone.stem.scale_conv.weight, scales['stage0.scale_conv.weight'])
    search = zoo.make_model('repopt_n1_hs', 3)
    search.backbone.stem.bn.weight.data.fill_(0.3)
    apply_scales(search, scales)


@pytest.mark.parametrize('setting', ['start', 'pretrained'])
def test_a_target_that_has_begun_goes_on_from_its_weights(home, tmp_path, setting):
    "Its gammas are not 1 any more, and its kernels are not merged with branches a second time."
    from aaai_lt.training.checkpoint import tensor_bytes
    torch.manual_seed(0)
    done = shaken(zoo.make_model('repopt_n1', 10)).float()
    (tmp_path/'done.safetensors').write_bytes(tensor_bytes(done.state_dict()))
    config = make_config(name='x', data='digits', **TARGET | {setting: str(tmp_path/'done.safetensors')})
    model = loop.starting_model(config, loop.prepare(config, False), fresh=True)
    assert all(torch.equal(p, done.state_dict()[n]) for n, p in model.named_parameters() if n.startswith('backbone.') and '.scale_' not in n)


@pytest.mark.parametrize('wrong, message', [
    ({'stage5.0.scale_conv.weight': torch.ones(3)}, 'stage5.0'), ({'stage0.conv.weight': torch.ones(3)}, 'stage0.conv.weight'), ({'stage1.0.scale_conv.weight': torch.ones(3, 3)}, r'no vector.*\(3, 3\)'),
    ({'stage1.0.scale_conv.weight': torch.ones(3, dtype=torch.int64)}, 'int64'), ({'stage1.0.scale_1x1.weight': torch.tensor([1.0, float('nan')])}, 'no vector of finite numbers'), ([torch.ones(3)], 'a list'), ({'model': {}}, "'model'"),
], ids=str)
def test_files_that_are_no_scales(tmp_path, wrong, message):
    torch.save(wrong, tmp_path/'s.pth')
    with pytest.raises(ConfigError, match=message): read_scales(tmp_path/'s.pth')


def test_hostile_scales(scales, tmp_path):
    torch.save(scales | {'stage0.scale_conv.weight': Canary(tmp_path/'canary')}, tmp_path/'s.pth')
    with pytest.raises(ConfigError, match='nothing else is loaded'): read_scales(tmp_path/'s.pth')
    assert not (tmp_path/'canary').exists()


# -- the optimizers

def multiplier_by_hand(block, power):
    "Tap by tap."
    a3, a1, ai = block.scales()
    factor = np.zeros(tuple(block.conv.weight.shape))
    for o in range(factor.shape[0]):
        for i in range(factor.shape[1]):
            for r in range(3):
                for c in range(3): factor[o, i, r, c] = abs(a3[o].item()) ** power + (abs(a1[o].item()) ** power + (o == i and ai is not None) if (r, c) == (1, 1) else 0)
    return torch.tensor(factor)


@pytest.fixture
def signed():
    "A small target with scales of both signs, float64."
    torch.manual_seed(0)
    model = timm.create_model('repopt_n1', num_classes=3, blocks=(2, 1, 1, 1)).double()
    apply_scales(model, {n: torch.randn_like(v) for n, v in extract_scales(model.state_dict()).items()})
    return model


def test_multiplier(signed):
    for block in repopt_blocks(signed):
        for power in (1, 2): assert torch.allclose(block.multiplier(power), multiplier_by_hand(block, power), atol=1e-6)  # the scales themselves are float32
    block = signed.to(memory_format=torch.channels_last).stages[0][0]
    assert block.multiplier(2).is_contiguous(memory_format=torch.channels_last)


def steps(model, optimizer, count=4):
    "Some steps with drawn gradients; the parameters after each."
    torch.manual_seed(1)
    for _ in range(count):
        for p in model.parameters(): p.grad = torch.randn_like(p)
        yield [(p, p.detach().clone(), p.grad.clone()) for p in model.parameters()], optimizer.step()


@pytest.mark.parametrize('nesterov', [True, False])
def test_sgd_by_its_formula(signed, nesterov):
    "g · M, then + decay · W, then momentum, then the step; parameters without multiplier as ever."
    lr, decay, mu = 0.1, 0.03, 0.9
    optimizer = torch.optim.SGD(signed.parameters(), lr, mu, weight_decay=decay, nesterov=nesterov)
    multiply_updates(optimizer, signed)
    factors, momenta = {b.conv.weight: multiplier_by_hand(b, 2) for b in repopt_blocks(signed)}, {}
    for before, _ in steps(signed, optimizer):
        for p, old, gradient in before:
            g = gradient * factors.get(p, 1.0) + decay * old
            momenta[p] = momenta[p] * mu + g if p in momenta else g
            assert torch.allclose(p, old - lr * (g + mu * momenta[p] if nesterov else momenta[p]), atol=1e-6)


def test_adamw_by_its_formula(signed):
    "Decay of the weight, then M times Adam's step."
    lr, decay, b1, b2, eps = 0.1, 0.03, 0.9, 0.999, 1e-8
    optimizer = torch.optim.AdamW(signed.parameters(), lr, (b1, b2), eps, decay)
    multiply_updates(optimizer, signed)
    factors, m, v = {b.conv.weight: multiplier_by_hand(b, 1) for b in repopt_blocks(signed)}, {}, {}
    for t, (before, _) in enumerate(steps(signed, optimizer), 1):
        for p, old, g in before:
            m[p], v[p] = b1 * m.get(p, 0) + (1 - b1) * g, b2 * v.get(p, 0) + (1 - b2) * g ** 2
            step = m[p] / (1 - b1 ** t) / ((v[p] / (1 - b2 ** t)).sqrt() + eps)
            assert torch.allclose(p, old * (1 - lr * decay) - lr * factors.get(p, 1.0) * step, atol=1e-6)


def test_other_optimizers_are_refused(signed):
    for other in (torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad):
        with pytest.raises(ConfigError, match=other.__name__): multiply_updates(other(signed.parameters(), 0.1), signed)


def pair(seed, mixed, head_options=None):
    "csla and target as classifiers, with equal scales, kernels and heads; float64."
    torch.manual_seed(seed)
    csla, target = (zoo.make_model(f'repopt_n1{mode}', 10, blocks=(2, 2, 2, 1)).double() for mode in ('_csla', ''))
    given = {n: v * torch.empty_like(v).uniform_(0.3, 1.5) * (torch.where(torch.rand_like(v) < 0.3, -1.0, 1.0) if mixed and 'identity' not in n else 1.0) for n, v in extract_scales(csla.state_dict()).items()}
    for model in (csla, target): apply_scales(model, given)
    for one, other in zip(repopt_blocks(csla), repopt_blocks(target)): other.conv.weight.data.copy_(one.kernel())
    target.head.load_state_dict(csla.head.state_dict())
    return csla, target


def largest_gap(mixed, frozen_scale_decay=True, **settings):
    "The largest difference of the losses in 20 steps of the loop's own optimizers, csla beside target."
    models = pair(1, mixed)
    optimizers = [make_optimizer(m, make_config(model=f'repopt_n1{mode}', scales='initial', **settings)) for m, mode in zip(models, ('_csla', ''))]
    for optimizer in optimizers:
        for group in optimizer.param_groups: group.update({'eps': 1e-30} if 'eps' in group else {})  # the usual one is scaled differently in each branch
    if not frozen_scale_decay:
        for group in optimizers[0].param_groups: group['weight_decay'] = 0.0
    gap, random = 0.0, np.random.default_rng(0)
    for _ in range(20):
        x, y = torch.tensor(random.standard_normal((8, 3, 32, 32))), torch.tensor(random.integers(10, size=8))
        losses = []
        for model, optimizer in zip(models, optimizers):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            losses.append(loss.item())
        gap = max(gap, abs(losses[0] - losses[1]))
    return gap


RULES = [{'optimizer': 'sgd', 'lr': 0.05, 'weight_decay': 0.01}, {'optimizer': 'momentum', 'lr': 0.05, 'weight_decay': 0.01}, {'optimizer': 'adamw', 'lr': 0.01, 'weight_decay': 0.01}]

@pytest.mark.parametrize('settings', RULES, ids=lambda s: s['optimizer'])
@pytest.mark.parametrize('mixed', [False, True], ids=['positive', 'mixed signs'])
def test_target_is_equivalent_to_its_branches(settings, mixed): assert largest_gap(mixed, **settings) < 1e-9


def test_equivalence_can_fail(monkeypatch):
    "Without the multipliers, with the identity at its scale instead of 1, with the signed rule, without decay of the identity's scale: each shows."
    with monkeypatch.context() as patch:
        patch.setattr(loop, 'multiply_updates', lambda optimizer, model: None)
        assert largest_gap(False, **RULES[0]) > 1e-3
    assert largest_gap(False, frozen_scale_decay=False, **RULES[0]) > 1e-6
    def changed(edit):
        real = RepOptBlock.multiplier
        def multiplier(block, power):
            factor = real(block, power)
            edit(block, factor)
            return factor
        return multiplier
    def scaled_identity(block, factor):
        if block.scale_identity is not None: factor[:, :, 1, 1] += (block.scale_identity.weight - 1).diag()
    def signs(block, factor):
        a3, a1, ai = block.scales()
        factor.copy_(repopt.merge_kernel(torch.ones_like(factor), torch.ones_like(factor[:, :, :1, :1]), a3, a1, None if ai is None else torch.ones_like(ai)))
    for edit, settings in ((scaled_identity, RULES[0]), (signs, RULES[2])):
        with monkeypatch.context() as patch:
            patch.setattr(RepOptBlock, 'multiplier', changed(edit))
            assert largest_gap(True, **settings) > 1e-3


def test_plain_training_is_left_alone():
    "scales: none. And a search or RepVGG has no multipliers either."
    for name, given in (('repopt_n1', 'none'), ('repopt_n1_hs', ''), ('repopt_n1_repvgg', ''), ('repvgg_n1', '')):
        optimizer = make_optimizer(zoo.make_model(name, 3), make_config(model=name, scales=given))
        assert not optimizer._optimizer_step_pre_hooks
    assert make_optimizer(zoo.make_model('repopt_n1', 3), make_config(model='repopt_n1', scales='initial'))._optimizer_step_pre_hooks


# -- settings

@pytest.mark.parametrize('settings, message', [
    ({'model': 'repopt_a0'}, 'is trained with scales'), ({'model': 'repopt_a0', 'scales': 'initial', 'clip': 5.0}, 'clip=5.0'), ({'model': 'repopt_a0', 'scales': 'initial', 'optimizer': 'lamb'}, "optimizer is 'lamb'"),
    ({'model': 'repopt_a0_hs', 'scales': 'mine'}, "model is 'repopt_a0_hs'"), ({'scales': 'initial'}, 'scales='), ({'model': 'repopt_a9', 'scales': 'initial'}, 'did you mean'), ({'freeze': 'backbone'}, 'random weights'), ({'freeze': 'head', 'start': 'x'}, 'freeze is'),
    ({'start': 'a', 'pretrained': 'b.pth'}, 'start and pretrained'), ({'stages': [{'epochz': 3}]}, "stage 1: unknown setting 'epochz': did you mean 'epochs'"), ({'stages': [{}, {'stages': []}]}, 'stages stands outside the stages, not in stage 2'),
    ({'stages': [{'quick': True}]}, 'quick stands outside'), ({'stages': 'search'}, 'stages is'), ({'stages': ['search']}, "stage 1 is 'search'"), ({'clip': 5.0, 'stages': [{'model': 'repopt_n1_hs'}, {'model': 'repopt_n1', 'scales': 'previous'}]}, 'stage 2: clip=5.0'),
    ({'weight_decay_rule': 'repvg'}, "did you mean 'repvgg'"),
], ids=str)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message): make_config(**settings)


def test_a_stage_with_other_data_describes_its_own():
    config = make_config(name='x', data='mine', where="split == 'train'", group='track', imbalance_factor=10, stages=[{'data': 'digits', 'model': 'repopt_n1_hs'}, {'model': 'repopt_n1', 'scales': 'previous'}])
    first, last = stage_configs(config)
    assert (first.name, first.where, first.group, first.imbalance_factor, first.input_size) == ('x-1', '', '', 0.0, 48)
    assert (last.name, last.data, last.where, last.group, last.scales, last.stages) == ('x', 'mine', "split == 'train'", 'track', 'x-1', [])


@pytest.mark.parametrize('settings, message', [({'scales': 'previous'}, 'no stage before'), ({'scales': 'nobody'}, 'no run'), ({'scales': 'none.pth'}, 'does not exist')])
def test_scales_that_are_not_there(home, settings, message):
    with pytest.raises(ConfigError, match=message): loop.train(make_config(name='x', model='repopt_n1', optimizer='sgd', **settings), say=quiet)
    assert not (home/'outputs'/'x').exists()


# -- runs

TARGET = {'model': 'repopt_n1', 'scales': 'initial', 'optimizer': 'sgd', 'lr': 0.05, 'head_options': {}, 'ema': 0.0, 'batch_size': 64, 'loss': 'cross_entropy'}

@pytest.mark.parametrize('changes', [{}, {'optimizer': 'adamw', 'lr': 2e-3, 'ema': 0.5, 'accumulate': 2}], ids=['sgd', 'adamw'])
def test_a_target_resumes(home, changes): check_resumes(home, [3, 2], epochs=2, **TARGET | changes)


STAGES = [{'model': 'repopt_n1_hs', 'clip': 5.0}, {'model': 'repopt_n1', 'scales': 'previous'}]

def staged(stop=None, say=quiet, **changes):
    common = {k: v for k, v in TARGET.items() if k not in ('model', 'scales')}
    return loop.train(make_config(**SETTINGS | common | {'epochs': 2, 'stages': STAGES} | changes), stop=stop, say=say)


def test_stages_resume(home):
    "Stopped in the search and in the training; the finished search is not touched again; the result is that of a run that was not stopped."
    said = []
    whole = staged(name='whole', say=said.append)
    assert [line.split(':')[0] for line in said if line.startswith('training')] == ['training whole-1', 'training whole'] and whole.folder.name == 'whole'
    for steps_ in (4, 9, 3):
        with pytest.raises(Stopped): staged(stop=after(steps_))
        if (home/'outputs'/'run-1'/'summary.json').exists(): search = content(home/'outputs'/'run-1')
    done = staged(say=said.append)
    assert any('run-1 is finished' in line for line in said) and content(home/'outputs'/'run-1') == search
    check_same_run(done.folder, whole.folder)
    check_same_run(home/'outputs'/'run-1', home/'outputs'/'whole-1')
    found, used = find_scales('run-1'), find_scales('run')
    assert found.keys() == used.keys() and all(torch.equal(found[n], used[n]) for n in found)
    start = extract_scales(timm.create_model('repopt_n1_hs').state_dict())
    assert all(not torch.equal(found[n], start[n]) for n in found), 'the search moved nothing'


def test_a_stopped_target_does_not_need_its_source(home):
    "The scales are in its checkpoint."
    whole = staged(name='whole')
    with pytest.raises(Stopped): staged(name='moved', stop=after(13))  # ten steps of search
    config = stage_configs(make_config(**SETTINGS | {k: v for k, v in TARGET.items() if k not in ('model', 'scales')} | {'epochs': 2, 'stages': STAGES, 'name': 'moved'}))[-1]
    shutil.rmtree(home/'outputs'/'moved-1')
    check_same_run(loop.train(config, say=quiet).folder, whole.folder)


def test_a_name_in_use_is_found_before_the_first_stage(home):
    staged(name='used', stages=[], model='repopt_n1_hs')
    with pytest.raises(ConfigError, match='with other settings'): staged(name='used')
    assert not (home/'outputs'/'used-1').exists()


def test_search_on_other_classes(home, tmp_path):
    "Scales of a search over three classes train a target for ten."
    from helpers import image_folder
    image_folder(tmp_path/'small', {'a': 40, 'b': 20, 'c': 20}, (32, 32))
    run = staged(epochs=1, warmup_epochs=0.0, select='last', stages=[STAGES[0] | {'data': str(tmp_path/'small'), 'input_size': 32}, STAGES[1]], data='digits')
    assert len(Run(home/'outputs'/'run-1').data['classes']) == 3 and len(run.data['classes']) == 10 and run.config.scales == 'run-1'


def test_classifier_retraining(home):
    "The backbone with its batch statistics stays bit for bit, the classifier does not, and does not begin with the old one."
    from safetensors.torch import load_file
    settings = {'name': 'c', 'epochs': 1, 'warmup_epochs': 0.0, 'model': 'repvgg_n1', 'input_size': 32, 'loss': 'cross_entropy', 'ema': 0.5, 'device': 'cpu'}
    second = {'start': 'previous', 'start_head': False, 'freeze': 'backbone', 'sampler': 'class_balanced'}
    loop.train(make_config(**settings, stages=[{}, second]), say=quiet)
    one, two = (load_file(home/'outputs'/name/'best.safetensors') for name in ('c-1', 'c'))
    assert all(torch.equal(v, one[n]) for n, v in two.items() if n.startswith('backbone.')) and not torch.equal(one['head.fc.weight'], two['head.fc.weight'])
    kept = loop.make_trainer(stage_configs(make_config(**settings, stages=[{}, second | {'start_head': True}]))[-1], data := loop.prepare(stage_configs(make_config(**settings))[0], False), home/'nowhere')
    fresh = loop.make_trainer(stage_configs(make_config(**settings, stages=[{}, second]))[-1], data, home/'nowhere')
    assert torch.equal(kept.plain.head.fc.weight, one['head.fc.weight']) and not torch.equal(fresh.plain.head.fc.weight, one['head.fc.weight'])
    assert not kept.plain.train().backbone.training and kept.plain.head.training and {id(p) for g in kept.optimizer.param_groups for p in g['params']} == {id(p) for p in kept.plain.head.parameters()}


def test_frozen_runs_resume(home):
    staged(name='base', stages=[], model='repvgg_n1', epochs=1, warmup_epochs=0.0)
    check_resumes(home, [3, 4], epochs=2, **TARGET | {'model': 'repvgg_n1', 'scales': '', 'start': 'base', 'freeze': 'backbone', 'start_head': False, 'sampler': 'class_balanced'})


def test_start_of_another_model_is_refused(home):
    staged(name='base', stages=[], model='repvgg_n1', epochs=1, warmup_epochs=0.0)
    with pytest.raises(ConfigError, match='does not fit the model'): staged(name='x', stages=[], model='repvgg_n3', start='base')
    with pytest.raises(ConfigError, match='has none'): staged(name='x', stages=[], model='repopt_n1', scales='base')
    assert not (home/'outputs'/'x').exists()
