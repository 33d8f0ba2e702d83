"RepVGG in all its variants: what is trained and what is shipped give the same answers, whatever the batch normalisations hold."
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from aaai_lt.core import ConfigError
from aaai_lt.models import repopt, repvgg, zoo
from aaai_lt.training.config import make_config
from aaai_lt.training.loop import decay_groups, make_optimizer

PUBLISHED = [name for name in timm.list_models('repvgg_*') if name not in repvgg.VARIANTS]


def shaken(model, size=32):
    "Random scales, shifts and statistics in every batch normalisation; the statistics around those of real features, so that depth does not blow the numbers up."
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.2, 0.8), nn.init.uniform_(norm.bias, -0.3, 0.3)  # larger ones make a chaos of a deep network, and rounding grows in it
        norm.momentum = None  # statistics of all that is seen
    with torch.no_grad(): model.train()(torch.rand(8, 3, size, size).to(next(model.parameters())))
    for norm in norms:
        norm.running_mean += norm.running_var.sqrt() * torch.empty_like(norm.running_mean).uniform_(-0.1, 0.1)
        norm.running_var.clamp_(min=norm.running_var.mean() / 4)  # a channel that hardly varied would be amplified in every layer
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)
    return model.eval()


def check_folded(model, tolerance, size=32, count=16):
    "No branch and no BN left; the same logits up to rounding, and the same decisions."
    folded = repvgg.deploy_form(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    kernels = [m for m in folded.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(kernels) == len([m for m in model.modules() if isinstance(m, (repvgg.RepVggBlock, repopt.RepOptBlock))])
    images = torch.rand(count, 3, size, size).to(next(model.parameters()))
    with torch.no_grad(): expected, got = model(images), folded(images)
    mean = expected.mean(0)
    expected, got = expected - mean, got - mean  # what the images differ in, without what they share
    assert ((got - expected).abs().max() / expected.abs().max()).item() < tolerance
    assert torch.equal(got.argmax(1), expected.argmax(1))
    assert len(expected.argmax(1).unique()) > 1, 'one decision for all images shows little'


@pytest.mark.parametrize('name', list(repvgg.VARIANTS))
def test_the_projects_variants_fold(name):
    torch.manual_seed(0)
    check_folded(shaken(zoo.make_model(name, 11).double()), 1e-9)


def test_the_published_variants_are_all_there():
    assert {'repvgg_a0', 'repvgg_a1', 'repvgg_a2', 'repvgg_b0', 'repvgg_b1', 'repvgg_b1g4', 'repvgg_b2', 'repvgg_b2g4', 'repvgg_b3', 'repvgg_b3g4', 'repvgg_d2se'} <= set(PUBLISHED)


@pytest.mark.parametrize('name', [name for name in PUBLISHED if name != 'repvgg_d2se'])
def test_the_published_variants_fold(name):
    "In float32, as they are large; grouped ones among them."
    torch.manual_seed(0)
    check_folded(shaken(timm.create_model(name, num_classes=11)), 1e-4, count=4)


def test_the_one_with_excitation_folds():
    "With random statistics 48 layers with squeeze and excitation amplify the last bit until nothing is left of the image; so each block is compared on the features that reach it."
    torch.manual_seed(0)
    model = shaken(timm.create_model('repvgg_d2se', num_classes=11))
    folded, features = repvgg.deploy_form(model), torch.rand(4, 3, 32, 32)
    pairs = [(one, other) for one, other in zip([model.stem, *(b for s in model.stages for b in s)], [folded.stem, *(b for s in folded.stages for b in s)])]
    assert len(pairs) == 48 and all(other.reparam_conv is not None and not isinstance(other.attn, nn.Identity) for _, other in pairs)
    for one, other in pairs:
        with torch.no_grad(): expected, got = one(features), other(features)
        assert ((got - expected).abs().max() / expected.abs().max()).item() < 1e-4
        features = expected / expected.std()


@pytest.mark.parametrize('options', [{'attn_layer': 'se', 'attn_kwargs': {'rd_ratio': 1 / 16, 'rd_divisor': 1}}, {'attn_layer': 'eca'}], ids=['se', 'eca'])
@pytest.mark.parametrize('name', ['repvgg_n1', 'repopt_n1', 'repopt_n1_hs'])
def test_attention_stays(name, options):
    "RepVGG has it before the ReLU, RepOpt behind; it is kept when the rest folds."
    torch.manual_seed(0)
    model = shaken(zoo.make_model(name, 7, **options).double())
    attention = sum('attn' in n for n, _ in model.named_parameters())
    assert attention and attention == sum('attn' in n for n, _ in repvgg.deploy_form(model).named_parameters())
    check_folded(model, 1e-9)


def test_the_order_of_excitation():
    block = zoo.make_model('repvgg_n1', 3, attn_layer='se').backbone.stages[0][0].eval()
    other = zoo.make_model('repopt_n1', 3, attn_layer='se').backbone.stages[0][0].eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert torch.allclose(block(x), F.relu(block.attn(block.conv_1x1(x) + block.conv_kxk(x))), atol=1e-6)
        assert torch.allclose(other(x), other.attn(F.relu(other.bn(other.conv(x)))), atol=1e-6)


def test_registered_functions_are_documented():
    for module, names in ((repvgg, repvgg.VARIANTS), (repopt, repopt.NAMES)):
        for name in names:
            entry = getattr(module, name)
            assert entry.__doc__ and entry.__name__ == name and entry.__module__ == module.__name__ and name in module.__all__
            assert timm.models.model_entrypoint(name) is entry


# -- weight decay

def decayed(model, rule='kernels', weight_decay=0.1):
    "The names of the parameters that decay."
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)] for group in decay_groups(model, weight_decay, rule) if group['weight_decay'] for p in group['params']}


@pytest.mark.parametrize('name', ['repvgg_n1', 'resnet10t', 'vit_tiny_patch16_224', 'repopt_n1'])
def test_usual_decay_is_timms(name):
    from timm.optim import param_groups_weight_decay
    model = zoo.make_model(name, 5)
    names = {id(p): n for n, p in model.named_parameters()}
    spared = [f'backbone.{n}' for n in getattr(model.backbone, 'no_weight_decay', set)()]  # a transformer's positions and class token
    timms = {names[id(p)] for group in param_groups_weight_decay(model, 0.1, no_weight_decay_list=spared) if group['weight_decay'] for p in group['params']}
    assert decayed(model) == timms


def test_every_parameter_is_in_one_group():
    for name, rule in (('repvgg_n1', 'kernels'), ('repvgg_n1', 'repvgg'), ('repopt_n1_hs', 'kernels')):
        model = zoo.make_model(name, 5)
        given = [id(p) for group in decay_groups(model, 0.1, rule) for p in group['params']]
        assert sorted(given) == sorted(id(p) for p in model.parameters())


def test_decay_of_the_identity():
    assert {n for n in decayed(zoo.make_model('repopt_n1_csla', 5)) if 'scale' in n or '.bn.' in n} == {f'backbone.stages.{s}.{b}.scale_identity.weight' for s, blocks in enumerate((2, 4, 14, 1)) for b in range(1, blocks)}
    assert {n for n in decayed(zoo.make_model('repvgg_n1', 5), 'repvgg')} == {f'backbone.stages.{s}.{b}.identity.weight' for s, blocks in enumerate((2, 4, 14, 1)) for b in range(1, blocks)} | {'head.fc.weight'}


def test_rule_of_repvgg_needs_branches():
    with pytest.raises(ConfigError, match='branches'): make_optimizer(zoo.make_model('resnet10t', 3), make_config(model='resnet10t', weight_decay_rule='repvgg'))


def test_custom_l2_is_the_decay_of_the_folded_kernel():
    "If the 1 × 1 branch is zero and the factors are equal, the centre counts half: its decay is shared by two branches of which one is off."
    torch.manual_seed(0)
    block = zoo.make_model('repvgg_n1', 3).double().backbone.stages[0][1].eval()
    for branch in (block.conv_kxk, block.conv_1x1): nn.init.ones_(branch.bn.weight)
    nn.init.zeros_(block.conv_1x1.conv.weight)
    kernel = block.conv_kxk.conv.weight
    plain, centre = kernel.square().sum(), kernel[:, :, 1, 1].square().sum()
    assert torch.isclose(repvgg.custom_l2(block), plain - centre / 2)


def test_custom_l2_is_trained(home):
    "The rule changes the weights; what the history calls the loss is still the loss alone."
    from aaai_lt.training.loop import train
    settings = {'epochs': 1, 'warmup_epochs': 0, 'optimizer': 'sgd', 'lr': 0.05, 'weight_decay': 0.05, 'model': 'repvgg_n1', 'input_size': 32, 'batch_size': 298}
    runs = [train(make_config(name=rule, weight_decay_rule=rule, **settings), say=lambda text: None) for rule in ('kernels', 'repvgg')]
    assert (runs[0].folder/'best.safetensors').read_bytes() != (runs[1].folder/'best.safetensors').read_bytes()
    assert runs[0].history.train_loss[0] == runs[1].history.train_loss[0]  # of one batch, before the first step
