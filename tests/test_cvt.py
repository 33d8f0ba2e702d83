"CvT: the published sizes, timm's interface, the class token, drop path."
import copy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

from aaai_lt.core import ConfigError
from aaai_lt.hardware.cost import cost
from aaai_lt.models.cvt import VARIANTS, Block, CvT
from aaai_lt.models.zoo import load_weights, make_backbone, make_model, memory_format


def nano(**options):
    torch.manual_seed(0)
    return timm.create_model('cvt_nano', **options)


def shaken(model):
    "Random statistics and scales in every normalisation, so that leaving one out shows."
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.uniform_(module.bias, -0.5, 0.5)
            if isinstance(module, nn.BatchNorm2d): nn.init.uniform_(module.running_mean, -0.5, 0.5), nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize('name, backbone, millions', [('cvt_13', 19_611_712, 20), ('cvt_21', 31_236_928, 32), ('cvt_w24', 276_169_344, 277)])
def test_published_sizes(name, backbone, millions):
    "The parameters without last norm and classifier (O3), and with them in the paper's millions; the maps; the meta device suffices."
    size = timm.models.get_pretrained_cfg(name).input_size[-1]
    with torch.device('meta'): whole, headless, images = timm.create_model(name).eval(), timm.create_model(name, num_classes=0, global_pool='').eval(), torch.empty(1, 3, size, size)
    counts = [sum(p.numel() for p in model.parameters()) for model in (whole, headless)]
    width = headless.num_features
    assert counts[1] == backbone and counts[0] == backbone + 2 * width + 1000 * width + 1000 and round(counts[0] / 1e6) == millions
    assert headless(images).shape == (1, width, size // 16, size // 16) and whole(images).shape == (1, 1000)
    assert [tuple(f.shape[1:]) for f in (headless.stage0(images), headless.stage1(headless.stage0(images)))] == [(VARIANTS[name][0][0], size // 4, size // 4), (VARIANTS[name][0][1], size // 8, size // 8)]


def test_multiply_adds_by_hand():
    "cvt_nano at 64 pixels: maps of 16², 8² and 4² places, a quarter of them as keys, a class token in the last stage."
    def stage(places, keys, prefix, width, blocks, kernel, channels):
        attention = 9 * width * (places + 2 * keys) + width ** 2 * (2 * (places + prefix) + 2 * (keys + prefix)) + 2 * (places + prefix) * (keys + prefix) * width
        return kernel ** 2 * channels * width * places + blocks * (attention + 8 * width ** 2 * (places + prefix))
    by_hand = stage(256, 64, 0, 32, 1, 7, 3) + stage(64, 16, 0, 64, 1, 3, 32) + stage(16, 4, 1, 128, 2, 3, 64)
    rows = cost('cvt_nano', 64, 10)
    assert rows.macs.sum() == by_hand + 128 * 10 and not (rows.kind == 'uncounted').any()


def whole_by_hand(model, image):
    "One image through a CvT, written with matrix products and unfolded images."
    def convolve(x, conv, bn):  # (C, h, w), depthwise 3 × 3
        patches = F.unfold(x[None], 3, padding=1, stride=conv.stride).view(x.shape[0], 9, -1)
        y = (patches * conv.weight.view(-1, 9, 1)).sum(1)
        return (((y.T - bn.running_mean) / (bn.running_var + bn.eps).sqrt()) * bn.weight + bn.bias)
    def norm(x, module): return (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias
    def linear(x, module): return x @ module.weight.T + module.bias
    x = image
    for i, heads in enumerate((1, 2, 4)):
        stage = getattr(model, f'stage{i}')
        proj = stage.patch_embed.proj
        side = (x.shape[1] + 2 * proj.padding[0] - proj.kernel_size[0]) // proj.stride[0] + 1
        t = norm(F.unfold(x[None], proj.kernel_size, padding=proj.padding, stride=proj.stride)[0].T @ proj.weight.flatten(1).T + proj.bias, stage.patch_embed.norm)
        prefix = stage.cls_token[0] if stage.cls_token is not None else t[:0]
        t = torch.cat([prefix, t])
        for block in stage.blocks:
            a, y, k = block.attn, norm(t, block.norm1), len(prefix)
            grid = y[k:].T.reshape(-1, side, side)
            q, key, v = (linear(torch.cat([y[:k], convolve(grid, c.conv, c.bn)]), p) for c, p in ((a.conv_proj_q, a.proj_q), (a.conv_proj_k, a.proj_k), (a.conv_proj_v, a.proj_v)))
            d = q.shape[1] // heads
            t = t + linear(torch.cat([torch.softmax(q[:, s] @ key[:, s].T * q.shape[1] ** -0.5, 1) @ v[:, s] for s in (slice(h * d, h * d + d) for h in range(heads))], 1), a.proj)
            z = linear(norm(t, block.norm2), block.mlp.fc1)
            t = t + linear(z * (1 + torch.erf(z / 2 ** 0.5)) / 2, block.mlp.fc2)
        x = t[len(prefix):].T.reshape(-1, side, side)
    return x, linear(norm(t[:1], model.norm), model.head)[0] if model.global_pool else None


def test_the_whole_network_written_out():
    model, images = shaken(nano(num_classes=5)).double(), torch.randn(2, 3, 48, 48).double()
    headless = shaken(nano(num_classes=0, global_pool='')).double()
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(('norm.', 'head.'))})
    for i in range(2):
        grid, logits = whole_by_hand(model, images[i])
        assert torch.allclose(model(images)[i], logits, atol=1e-10) and torch.allclose(headless(images)[i], grid, atol=1e-10)
        assert torch.allclose(model.forward_features(images)[i, 1:].T.reshape(grid.shape), grid, atol=1e-10)


def test_interface_of_timm():
    images = torch.randn(2, 3, 64, 96)
    model = shaken(nano(num_classes=5))
    assert torch.equal(model.forward_head(model.forward_features(images)), model(images)) and model.forward_features(images).shape == (2, 1 + 4 * 6, 128)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(model.get_classifier()(pooled), model(images)) and pooled.shape == (2, model.head_hidden_size) == (2, model.num_features)
    norm = model.norm.weight.clone()
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled) and torch.equal(model.norm.weight, norm) and model.num_classes == 0
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0, '')
    assert model(images).shape == model.forward_features(images).shape == (2, 128, 4, 6) and model.num_prefix_tokens == 0
    for bad in ((3, ''), (3, 'avg')):
        with pytest.raises(ValueError, match='global_pool'): model.reset_classifier(*bad)
    with pytest.raises(ConfigError, match='global_pool'): make_backbone('cvt_nano', global_pool='max')
    cfg = model.pretrained_cfg
    assert cfg['classifier'] == 'head' and hasattr(model.get_submodule(cfg['first_conv']), 'weight') and not cfg['fixed_input_size']
    assert [i['num_chs'] for i in model.feature_info] == [32, 64, 128]
    features = timm.create_model('cvt_nano', features_only=True, out_indices=(0, 2))
    assert [tuple(f.shape[1:]) for f in features(images)] == [(32, 16, 24), (128, 4, 6)] and features.feature_info.reduction() == [4, 16]


def test_layers_of_the_layer_decay():
    "The stem changes least, the classifier most; every parameter has its group; each block of a stage its own, after those before it."
    model = nano(num_classes=3)
    groups, scale = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5), {}
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        for p in group['params']: scale[names[id(p)]] = group['lr_scale']
    assert set(scale) == {n for n, _ in model.named_parameters()}
    order = ['stage0.patch_embed.proj.weight', 'stage0.blocks.0.attn.proj.weight', 'stage1.blocks.0.attn.proj.weight', 'stage2.blocks.0.attn.proj.weight', 'stage2.blocks.1.mlp.fc1.weight', 'head.weight']
    assert [scale[n] for n in order] == [0.5 ** k for k in range(5, -1, -1)]
    assert scale['stage2.cls_token'] == scale['stage2.patch_embed.proj.weight'] == scale['stage2.blocks.0.norm1.weight'] and scale['norm.weight'] == scale['stage2.blocks.1.mlp.fc1.weight']  # as in timm's vision transformers
    undecayed = {names[id(p)] for group in groups if group['weight_decay'] == 0 for p in group['params']}
    assert 'stage2.cls_token' in undecayed


def test_drop_path_grows_by_block_in_the_last_stage():
    "D35: linear over the blocks of stage 3 and nothing before; the rate is an option."
    def rates(model): return [[round(b.drop_path1.drop_prob, 4) for b in stage.blocks] for stage in (model.stage0, model.stage1, model.stage2)]
    with torch.device('meta'): models = [timm.create_model('cvt_21', num_classes=0), timm.create_model('cvt_w24', num_classes=0), make_model('cvt_13', 3, drop_path_rate=0.45).backbone]
    assert rates(models[0]) == [[0], [0] * 4, [round(0.1 * i / 15, 4) for i in range(16)]]
    assert rates(models[1])[2][-1] == 0.3 and rates(models[1])[:2] == [[0, 0], [0, 0]]
    assert rates(models[2])[2] == [round(0.05 * i, 4) for i in range(10)]


def test_a_dropped_branch_leaves_the_tokens():
    "Each image keeps or loses each branch by itself; what is kept is scaled by 1 / (1 − rate)."
    torch.manual_seed(0)
    block = Block(8, 2, drop_path=0.5).train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d): module.eval()
    x = torch.randn(1, 12, 8).expand(64, -1, -1)
    with torch.no_grad():
        out, attended = block(x, (3, 4)), x[:1] + 2 * block.attn(block.norm1(x[:1]), (3, 4))
        ways = [x[0], attended[0], *(t[0] + 2 * block.mlp(block.norm2(t))[0] for t in (x[:1], attended))]
        seen = [min(range(4), key=lambda k: (image - ways[k]).abs().max()) for image in out]
    assert all(torch.allclose(image, ways[k], atol=1e-5) for image, k in zip(out, seen)) and set(seen) == {0, 1, 2, 3}


def test_training_copying_and_saving(tmp_path):
    torch.manual_seed(0)
    model, images, labels = make_model('cvt_nano', 4), torch.randn(16, 3, 48, 48), torch.arange(16) % 4
    layout = memory_format(model, torch.device('cpu'))
    model = model.to(memory_format=layout).train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(12):
        loss = F.cross_entropy(model(images.contiguous(memory_format=layout)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and all(p.grad is not None for p in model.parameters())
    model.eval()
    torch.save(model.state_dict(), tmp_path/'w.pth')
    other = make_model('cvt_nano', 4).eval()
    load_weights(other, tmp_path/'w.pth')
    assert torch.allclose(other(images), model(images), atol=1e-5) and torch.equal(copy.deepcopy(model)(images), model(images))


def test_other_shapes_of_the_family():
    model = CvT((16, 32, 48), (1, 2, 3), (1, 2, 1), num_classes=2, in_chans=1, act_layer='quick_gelu').eval()
    assert model(torch.randn(1, 1, 40, 72)).shape == (1, 2)
    assert nano(in_chans=4, depths=(1, 1, 1)).stage0.patch_embed.proj.weight.shape == (32, 4, 7, 7)
