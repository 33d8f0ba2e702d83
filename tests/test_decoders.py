"Heads that read the map: against plain formulas and the published counts, on every kind of backbone, trained, frozen, saved, exported."
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from aaai_lt import core
from aaai_lt.analysis.attention import attention_map, plot_attention
from aaai_lt.analysis.gradcam import grad_cam
from aaai_lt.core import ConfigError
from aaai_lt.hardware.cost import cost
from aaai_lt.hardware.graph import empty_model
from aaai_lt.models.decoders import GroupLinear, MLDecoder, Query2Label, sine_positions
from aaai_lt.models.heads import HEADS, make_head, reads_map
from aaai_lt.models.weights import read_tensors
from aaai_lt.models.zoo import make_model, memory_format, token_map
from aaai_lt.training.config import make_config
from aaai_lt.training.loop import train
from aaai_lt.training.prepare import model_of
from aaai_lt.training.run import Run

SMALL = {'width': 32, 'heads': 4, 'feed_forward': 64}
FORMS = [('ml_decoder', SMALL), ('ml_decoder', SMALL | {'learnable': True, 'dropout': 0.5}), ('query2label', SMALL), ('query2label', SMALL | {'style': 'seed'})]
IDS = ['ML-Decoder', 'learnable ML-Decoder', 'Query2Label', "the seed's Query2Label"]


def numbers(parameters): return sum(p.numel() for p in parameters)


# -- the published counts

SEED, LEARNT = {'style': 'seed'}, {'learnable': True, 'dropout': 0.5}
PUBLISHED = [  # model, head, options, pixels, all parameters, those that are trained
    ('resnet50', 'linear', {}, 224, 23_630_972, 23_630_972), ('resnet101', 'linear', {}, 224, 42_623_100, 42_623_100), ('tresnet_v2_l', 'ml_decoder', {}, 224, 51_307_196, 51_261_116), ('tresnet_xl', 'linear', {}, 224, 75_938_664, 75_938_664),
    ('tresnet_xl', 'ml_decoder', {}, 224, 83_427_560, 83_381_480), ('tresnet_xl', 'ml_decoder', LEARNT, 224, 83_427_560, 83_427_560), ('cvt_21', 'query2label', SEED, 224, 36_746_108, 36_746_108), ('cvt_w24', 'query2label', SEED, 384, 281_842_364, 281_842_364),
    ('tresnet_l', 'ml_decoder', LEARNT, 224, 61_032_540, 61_032_540), ('tresnet_v2_l', 'linear', {}, 224, 44_248_764, 44_248_764), ('tresnet_xl', 'query2label', SEED, 224, 81_870_056, 81_870_056),
    ('swinv2_base_window8_256', 'linear', {}, 256, 86_955_316, 86_955_316), ('swinv2_base_window12_192', 'ml_decoder', {}, 192, 93_288_756, 93_242_676),
]


@pytest.mark.parametrize('name, head, options, size, whole, trained', PUBLISHED, ids=[f'{name} {head}{" learnt" * bool("learnable" in options)}' for name, head, options, *_ in PUBLISHED])
def test_published_parameters(name, head, options, size, whole, trained):
    "O3: plain counting and the cost function, without memory."
    model = empty_model(name, 60, size, head, options)
    assert (numbers(model.parameters()), numbers(p for p in model.parameters() if p.requires_grad)) == (whole, trained)
    rows = cost(name, size, 60, deploy=False, model_options={'head': head, 'head_options': options})
    assert rows.parameters.sum() == whole and not rows.kind.isin(['unused', 'uncounted']).any()


def test_published_parameters_are_those_of_the_packaged_table():
    table = core.table('aicoss_params')
    assert sorted(row[4:] for row in PUBLISHED[:8]) == sorted(zip(table.params_total, table.params_trainable))


def test_a_head_for_2048_channels():
    assert numbers(MLDecoder(2048, 60).parameters()) == 7_181_372 and numbers(MLDecoder(2656, 60).parameters()) == 7_648_316


@pytest.mark.parametrize('head, options, constant', [
    ('ml_decoder', {}, 60 * 768 ** 2),  # the projection of the queries
    ('ml_decoder', {'groups': 20, 'width': 64}, 20 * 64 ** 2),
    ('query2label', {}, 60 * 4 * 256 ** 2 + 2 * 60 ** 2 * 256 + 60 * 256 ** 2),  # the first self-attention among the labels, and the projection of the queries
    ('query2label', {'style': 'seed'}, 60 * 4 * 256 ** 2 + 2 * 60 ** 2 * 256 + 60 * 256 ** 2),
])
def test_multiply_adds_are_those_of_torch(head, options, constant):
    "Less what is computed from weights alone, which is the same for every image."
    model = empty_model('resnet10t', 60, 64, head, options).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH): model(torch.empty(1, 3, 64, 64, device='meta'))
    assert counter.get_total_flops() // 2 - cost(model, 64).macs.sum() == constant


# -- formulas

@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))
def test_group_linear_is_a_dot_product_for_each_class(classes, groups, seed):
    torch.manual_seed(seed)
    groups = min(groups, classes)
    layer, queries = GroupLinear(groups, 6, classes), torch.randn(3, groups, 6)
    nn.init.normal_(layer.bias)
    size = math.ceil(classes / groups)
    expected = torch.stack([torch.stack([queries[i, c // size].dot(layer.weight[c // size, :, c % size]) + layer.bias[c] for c in range(classes)]) for i in range(3)])
    assert torch.allclose(layer(queries), expected, atol=1e-5)


@pytest.mark.parametrize('classes, groups, expected', [(60, 0, 60), (101, 0, 100), (10_000, 0, 100), (7, 3, 3), (2, 60, 2), (10_000, 10_000, 10_000)])
def test_number_of_queries(classes, groups, expected):
    with torch.device('meta'): head = MLDecoder(8, classes, groups, width=8, feed_forward=8)
    assert len(head.queries) == expected and head.fc.bias.shape == (classes,)
    assert head(torch.empty(1, 4, 8, device='meta')).shape == (1, classes)
    assert len(head.query_of_class) == classes and head.query_of_class.max() < expected and (head.query_of_class.diff() >= 0).all()


def mha(query, key, value, module):
    "Attention with many heads, written out for one image with loops."
    wq, wk, wv = module.in_proj_weight.chunk(3)
    bq, bk, bv = module.in_proj_bias.chunk(3)
    q, k, v = query @ wq.T + bq, key @ wk.T + bk, value @ wv.T + bv
    d = q.shape[1] // module.num_heads
    parts = [slice(h * d, (h + 1) * d) for h in range(module.num_heads)]
    weights = [torch.softmax(q[:, s] @ k[:, s].T / d ** 0.5, 1) for s in parts]
    return torch.cat([w @ v[:, s] for w, s in zip(weights, parts)], 1) @ module.out_proj.weight.T + module.out_proj.bias, sum(weights) / len(weights)


def shaken(module):
    "Every weight random, so that nothing is zero or one by chance of its start."
    torch.manual_seed(0)
    for p in module.parameters(): nn.init.normal_(p, std=0.3)
    return module.double().eval()


def norm(x, module): return F.layer_norm(x, x.shape[1:], module.weight, module.bias, 1e-5)


def feed(x, module): return (x @ module[0].weight.T + module[0].bias).relu() @ module[3].weight.T + module[3].bias


def test_ml_decoder_written_out():
    head, tokens = shaken(MLDecoder(12, 7, groups=3, width=16, heads=4, feed_forward=32)), torch.randn(3, 9, 12).double()
    for i, x in enumerate(tokens):
        memory, layer = (x @ head.embed.weight.T + head.embed.bias).relu(), head.decoder
        q = norm(2 * head.queries, layer.norm1)
        gathered, weights = mha(q, memory, memory, layer.cross_attention)
        q = norm(q + gathered, layer.norm2)
        q = norm(q + feed(q, layer.feed_forward), layer.norm3)
        logits = torch.stack([q[c // 3] @ head.fc.weight[c // 3, :, c % 3] + head.fc.bias[c] for c in range(7)])
        assert torch.allclose(head(tokens)[i], logits, atol=1e-9)


def written_out(head, x):
    "Query2Label for one image: logits, and the attention of its last layer."
    places = x @ head.embed.weight.T + head.embed.bias
    positions = sine_positions(math.isqrt(len(x)), places.shape[1]).double() if head.style == 'paper' else torch.zeros_like(places)
    e = head.encoder
    places = norm(places + mha(places + positions, places + positions, places, e.attention)[0], e.norm1)
    places = norm(norm(places + feed(places, e.feed_forward), e.norm2), head.encoder_norm)
    q = head.queries
    for layer in head.decoder:
        q = norm(q + mha(q, q, q, layer.self_attention)[0], layer.norm1)
        gathered, weights = mha(q, places + positions, places, layer.cross_attention)
        q = norm(q + gathered, layer.norm2)
        q = norm(q + feed(q, layer.feed_forward), layer.norm3)
    q = norm(q, head.decoder_norm)
    if head.style == 'seed': return head.fc.weight @ q.flatten() + head.fc.bias, weights
    return torch.stack([q[c] @ head.fc.weight[c, :, 0] + head.fc.bias[c] for c in range(len(q))]), weights


@pytest.mark.parametrize('style', ['paper', 'seed'])
def test_query2label_written_out(style):
    head, tokens = shaken(Query2Label(12, 5, style, width=16, heads=4, feed_forward=32)), torch.randn(3, 9, 12).double()
    for i, x in enumerate(tokens): assert torch.allclose(head(tokens)[i], written_out(head, x)[0], atol=1e-6)


@pytest.mark.parametrize('style', ['paper', 'seed'])
def test_attention_maps_are_the_weights_of_the_last_layer(style):
    model = make_model('test_resnet', 5, 'query2label', SMALL | {'style': style}, output_stride=8).double().eval()
    shaken(model.head)
    images = torch.randn(2, 3, 32, 32).double()
    maps, tokens = attention_map(model, images, [3, 0]), token_map(model.backbone, model.backbone(images))
    for i in range(2): assert torch.allclose(maps[i], written_out(model.head, tokens[i])[1][[3, 0]].view(2, 4, 4).float(), atol=1e-5)


def test_classes_of_one_query_share_a_map():
    model = make_model('test_resnet', 7, 'ml_decoder', SMALL | {'groups': 3}, output_stride=8).eval()
    maps = attention_map(model, torch.randn(2, 3, 40, 40))
    assert maps.shape == (2, 7, 5, 5) and torch.allclose(maps.sum((2, 3)), torch.ones(2, 7), atol=1e-5)
    assert torch.equal(maps[:, 0], maps[:, 2]) and not torch.equal(maps[:, 2], maps[:, 3]) and torch.equal(maps[:, 3], maps[:, 5])
    plot_attention(model, torch.randn(2, 3, 40, 40), torch.zeros(2, 40, 40, 3, dtype=torch.uint8).numpy(), list('abcdefg'), 2)


def test_sine_positions_by_hand():
    "A row's, then a column's coordinate as a part of the map times 2π; sines, then cosines."
    codes = sine_positions(5, 8)
    for row in range(5):
        for column in range(5):
            angles = [(p + 1) / 5 * 2 * math.pi / 10_000 ** (k / 2) for p in (row, column) for k in range(2)]
            expected = [f(a) for pair in (angles[:2], angles[2:]) for f in (math.sin, math.cos) for a in pair]
            assert torch.allclose(codes[5 * row + column], torch.tensor(expected), atol=1e-6)


def test_start_weights():
    "Frozen normal queries in ML-Decoder, uniform labels in the seed's Query2Label, classifiers as published."
    torch.manual_seed(0)
    head = MLDecoder(64, 60)
    assert not head.queries.requires_grad and abs(head.queries.std() - 1) < 0.01 and not head.fc.bias.any()
    assert abs(head.fc.weight.std() - (2 / (60 + 768)) ** 0.5) < 0.002
    assert MLDecoder(64, 60, learnable=True).queries.requires_grad and MLDecoder(64, 60, learnable=True).decoder.dropout.p == 0.1
    seed, paper = Query2Label(64, 60, 'seed'), Query2Label(64, 60)
    assert 0 <= seed.queries.min() and seed.queries.max() <= 1 and abs(paper.queries.std() - 1) < 0.02
    assert 0.9 / 16 < paper.fc.weight.abs().max() <= 1 / 16 and 0 < paper.fc.bias.abs().max() <= 1 / 16


# -- any backbone

MAPS = [('resnet10t', 64, 4), ('repvgg_s0', 64, 4), ('repopt_s0', 64, 4), ('mobilenetv3_small_050', 64, 4), ('convnext_atto', 64, 4), ('tresnet_m', 64, 4), ('vit_tiny_patch16_224', 64, 16), ('beit_base_patch16_224', 64, 16), ('deit3_small_patch16_224', 64, 16), ('vit_base_patch16_siglip_224', 64, 16),
        ('swin_tiny_patch4_window7_224', 64, 4), ('swinv2_tiny_window8_256', 64, 4), ('swinv2_cr_tiny_224', 64, 4), ('cait_xxs24_224', 64, 16), ('xcit_nano_12_p16_224', 64, 16), ('volo_d1_224', 64, 16), ('mvitv2_tiny', 224, 49), ('hiera_tiny_224', 224, 49), ('levit_128s', 224, 16), ('maxvit_nano_rw_256', 64, 4), ('mambaout_femto', 64, 4), ('cvt_13', 64, 16)]


@pytest.mark.parametrize('name, size, places', MAPS, ids=[name for name, *_ in MAPS])
def test_any_backbone(name, size, places):
    "The map's places and no others, of as many features as the head was made for; and every weight of the model is used."
    with torch.device('meta'): model, images = make_model(name, 11, 'ml_decoder', SMALL, input_size=size).eval(), torch.empty(2, 3, size, size)
    assert token_map(model.backbone, model.backbone(images)).shape == (2, places, model.head.embed.in_features)
    logits = model(images)
    assert logits.shape == (2, 11)
    logits.sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad]


class Places(nn.Module):
    "A backbone that writes the number of the place into its first feature."
    def __init__(self, form): super().__init__(); self.form, self.output_fmt, self.num_prefix_tokens = form, form, 2
    def forward(self, images):
        grid = torch.arange(12.0).view(1, 3, 4, 1).expand(len(images), 3, 4, 5)
        return grid.permute(0, 3, 1, 2) if self.form == 'NCHW' else grid if self.form == 'NHWC' else torch.cat([torch.full((len(images), 2, 5), -1.0), grid.flatten(1, 2)], 1)


@pytest.mark.parametrize('form', ['NCHW', 'NHWC', 'tokens'])
def test_places_stay_in_order(form):
    backbone = Places(form)
    assert torch.equal(token_map(backbone, backbone(torch.zeros(2, 3, 8, 8)))[1, :, 0], torch.arange(12.0))


def test_a_backbone_without_a_map():
    for name in ('pit_ti_224', 'deit_tiny_distilled_patch16_224', 'crossvit_9_240'):
        with pytest.raises(ConfigError): make_model(name, 3, 'ml_decoder', SMALL)(torch.zeros(1, 3, 224, 224))
    with pytest.raises(ConfigError, match='without a map'): make_model('test_resnet', 3, 'ml_decoder', SMALL, global_pool='avg')(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ConfigError, match='class queries'): attention_map(make_model('test_resnet', 3), torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize('make, message', [
    (lambda: make_head('ml_decoder', 8, 3, learnabel=True), "did you mean 'learnable'"), (lambda: make_head('ml_decoder', 8, 3, learnable=1), 'true or false'), (lambda: make_head('ml_decoder', 8, 3, groups=-1), 'groups'), (lambda: make_head('ml_decoder', 8, 3, dropout=1.0), 'dropout'),
    (lambda: make_head('ml_decoder', 8, 3, width=100), '8 attention heads cannot share: 96'), (lambda: make_head('query2label', 8, 3, style='q2l'), "'paper' or 'seed'"), (lambda: make_head('query2label', 8, 3, width=6, heads=2), 'multiple of 4'),
    (lambda: make_head('query2label', 8, 10_000, style='seed'), "take style 'paper'"), (lambda: make_config(head='query2labl'), "did you mean 'query2label'"), (lambda: make_config(head='ml_decoder', head_options={'heads': 5}), 'cannot share'),
])
def test_option_errors(make, message):
    with pytest.raises(ConfigError, match=message): make()


def test_weights_say_which_normalisation_they_expect():
    "D20: TResNets read pixels in [0, 1]."
    for name in ('tresnet_m', 'tresnet_l', 'tresnet_xl', 'tresnet_v2_l'):
        with torch.device('meta'): model = make_model(name, 3, 'ml_decoder', SMALL)
        assert (model.mean, model.std) == ((0, 0, 0), (1, 1, 1))
    with torch.device('meta'): assert make_model('cvt_21', 3, 'query2label').mean == (0.485, 0.456, 0.406)


def test_models_of_a_fixed_size_take_the_size_that_is_asked_for():
    "D33: SwinV2 at 224 pixels, which its own 256 or 192 do not allow."
    for name, own in (('swinv2_base_window8_256', 256), ('swinv2_base_window12_192', 192)):
        for asked, size in ((224, 224), (0, own)):
            with torch.device('meta'): assert make_model(name, 60, 'ml_decoder', SMALL, input_size=asked).eval()(torch.empty(1, 3, size, size)).shape == (1, 60)


# -- at work

@pytest.mark.parametrize('head, options', FORMS, ids=IDS)
def test_a_few_steps_lower_the_loss(head, options):
    torch.manual_seed(0)
    model, images, targets = make_model('test_resnet', 6, head, options).train(), torch.randn(16, 3, 48, 48), (torch.rand(16, 6) < 0.4).float()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    queries = model.head.queries.clone()
    for _ in range(15):
        loss = F.binary_cross_entropy_with_logits(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(queries, model.head.queries) == (head == 'ml_decoder' and not options.get('learnable'))


@pytest.mark.parametrize('head, options', FORMS, ids=IDS)
def test_layouts_precision_and_batches(head, options):
    "Channels-last and the batch size change nothing; bfloat16 little."
    torch.manual_seed(0)
    model, images = make_model('test_resnet', 6, head, options).eval(), torch.randn(5, 3, 48, 48)
    with torch.no_grad():
        logits = model(images)
        assert torch.allclose(torch.cat([model(x[None]) for x in images]), logits, atol=1e-5)
        with torch.autocast('cpu', torch.bfloat16): assert (model(images).float() - logits).abs().max() < 0.1 * logits.abs().max()
        layout = memory_format(model, torch.device('cpu'))
        assert layout == torch.channels_last and torch.allclose(model.to(memory_format=layout)(images.contiguous(memory_format=layout)), logits, atol=1e-5)


@pytest.mark.parametrize('head, options', FORMS, ids=IDS)
def test_freeze_trains_the_head_only(head, options):
    model = make_model('test_resnet', 6, head, options)
    model.freeze()
    model.train()(torch.randn(4, 3, 48, 48)).square().sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters()) and all(p.grad is not None for p in model.head.parameters() if p.requires_grad)
    assert not any(m.training for m in model.backbone.modules()) and model.head.training


class Largest(TorchDispatchMode):
    "The largest tensor that any operation makes."
    numbers = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(output) if isinstance(t, torch.Tensor))])
        return output


def test_ten_thousand_classes():
    "Forward and backward make nothing larger than the classifier's own weights, once: no copy for each image."
    torch.manual_seed(0)
    head, tokens = MLDecoder(512, 10_000), torch.randn(16, 49, 512)
    with Largest() as largest: head(tokens).square().mean().backward()
    assert numbers(head.parameters()) == 393_984 + 76_800 + 2_362_368 + 3_148_544 + 4_608 + 7_680_000 + 10_000 and largest.numbers == head.fc.weight.numel() == 7_680_000


def test_grad_cam_of_a_head_that_reads_the_map():
    model = make_model('test_resnet', 6, 'ml_decoder', SMALL, output_stride=8).eval()
    assert grad_cam(model, torch.randn(2, 3, 48, 48), torch.tensor([0, 5])).shape == (2, 6, 6)


def test_every_head_is_here_or_reads_what_is_pooled():
    "A new head that reads the map must be added to the tests of this file."
    assert {name for name, head in HEADS.items() if reads_map(head)} == {name for name, _ in FORMS}


def test_runs(home):
    "A run with ML-Decoder, one that begins with its backbone under another head, and their saved weights."
    short = {'data': 'digits', 'input_size': 32, 'device': 'cpu', 'epochs': 2, 'warmup_epochs': 0.5, 'model': 'cvt_nano', 'model_options': {'drop_path_rate': 0.1}, 'head_options': SMALL}
    first = train(make_config(**short, head='ml_decoder', name='first'), say=lambda text: None)
    second = train(make_config(**short, head='query2label', name='second', start='first', start_head=False, freeze='backbone'), say=lambda text: None)
    one, two = (read_tensors(run.folder/'best.safetensors') for run in (first, second))
    assert all(torch.equal(one[n], two[n]) for n in one if n.startswith('backbone.')) and any(n.startswith('backbone.') for n in one)
    for run, state in ((first, one), (second, two)):
        run = Run(run.folder)
        model = model_of(run.config, 10, run.data['input_size'])
        assert model.state_dict().keys() == state.keys() and {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in state.items()}
