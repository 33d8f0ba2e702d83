"Export of ten families of models and every head: real images, one and seven at a time, with nothing and with everything inside the file."
import numpy as np
import pytest
import torch
from torch import nn

from aaai_lt.core import ConfigError, DataError
from aaai_lt.hardware import export
from aaai_lt.models.heads import fold_adjustment
from aaai_lt.models.zoo import make_model

FAMILIES = ['repvgg_n1', 'resnet10t', 'mobilenetv3_small_050', 'convnext_atto', 'vit_tiny_patch16_224', 'regnetx_002', 'mobileone_s0', 'efficientvit_b0', 'ghostnet_050', 'edgenext_xx_small']
LARGER = ['swin_tiny_patch4_window7_224', 'efficientnet_b0', 'densenet121', 'fastvit_t8', 'levit_128s']
SIZE = 64
DECODER = {'width': 32, 'heads': 4, 'feed_forward': 64}


@pytest.fixture(scope='module')
def digits():
    "Handwriting as the network sees it: uint8, (21, SIZE, SIZE, 3)."
    from sklearn.datasets import load_digits
    pixels = torch.from_numpy(load_digits().images[:21]).float()[:, None].expand(-1, 3, -1, -1) * (255 / 16)
    return torch.nn.functional.interpolate(pixels, (SIZE, SIZE), mode='bilinear').round().byte().permute(0, 2, 3, 1).contiguous()


def made(name, digits, head='linear', head_options=None, **options):
    "A model whose normalisations have seen the images: fresh ones would hide a wrong export."
    torch.manual_seed(0)
    model = make_model(name, 7, head, head_options, input_size=SIZE, **options)
    images = export.model_images(digits, {'input_size': SIZE, 'mean': model.mean, 'std': model.std})
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.uniform_(module.bias, -0.3, 0.3)
            module.momentum = None
    with torch.no_grad(): model.train()(images)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm): module.running_var.clamp_(min=module.running_var.mean() / 4)  # a channel that hardly varied would amplify rounding in every layer
    return model.eval(), images


def check(model, images, tmp_path, **inside):
    whole = export.Shipped(model, inside.get('preprocessing', ''), inside.get('activation', ''))
    file = export.export_onnx(model, tmp_path/'model.onnx', SIZE, **inside)
    comparison = export.compare(whole, file, images)
    assert list(comparison.batch) == [1, 7] and (comparison.images == len(images)).all()
    export.check_export(comparison)
    return file


@pytest.mark.recipes
@pytest.mark.parametrize('name', [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)])
def test_families(name, digits, tmp_path):
    model, images = made(name, digits)
    check(model, images, tmp_path)


@pytest.mark.parametrize('head, options', [('linear', {'dropout': 0.5}), ('cosine', {}), ('cosine', {'sub_centers': 3}), ('arcface', {'sub_centers': 2, 'margin': 'adaptive'}),
    ('ml_decoder', DECODER | {'groups': 3}), ('query2label', DECODER), ('query2label', DECODER | {'style': 'seed'})])
def test_heads_with_everything_inside(head, options, digits, tmp_path):
    model, _ = made('resnet10t', digits, head, options, standardize=True)
    file = check(model, digits, tmp_path, preprocessing='nhwc', activation='softmax')
    scores = export.open_onnx(file).run(None, {'images': digits[:5].numpy()})[0]
    assert np.allclose(scores.sum(1), 1, atol=1e-5) and (scores >= 0).all()
    assert export.read_metadata(file) == {'input': export.INPUTS['nhwc'], 'output': export.OUTPUTS['softmax']}


TRANSFORMERS = {'vit_tiny_patch16_224': {'depth': 2}, 'swin_tiny_patch4_window7_224': {'embed_dim': 24, 'depths': (1, 1, 1, 1)}, 'cvt_nano': {'depths': (1, 1, 1)}}


@pytest.mark.recipes
@pytest.mark.parametrize('name', [*TRANSFORMERS][:2] + [pytest.param('cvt_nano', marks=pytest.mark.slow)])
@pytest.mark.parametrize('head', ['ml_decoder', 'query2label'])
def test_heads_that_read_the_map(name, head, digits, tmp_path):
    "From tokens and from maps with the channels last, every weight of the head random. Those on a convolutional network are above."
    model, images = made(name, digits, head, DECODER, **TRANSFORMERS[name])
    for p in model.head.parameters(): nn.init.normal_(p, std=0.2)
    check(model, images, tmp_path)


def test_a_prior_behind_a_head_that_reads_the_map(digits, tmp_path):
    model, images = made('cvt_nano', digits, 'ml_decoder', DECODER, depths=(1, 1, 1))
    before = model(images).detach()
    model.head = fold_adjustment(model.head, torch.linspace(-3, 0, 7))
    assert torch.allclose(model(images), before - torch.linspace(-3, 0, 7), atol=1e-5)
    check(model, images, tmp_path)


def test_layouts_give_the_same_answers(digits, tmp_path):
    "The three forms of input, each prepared by hand."
    model, images = made('repvgg_m0', digits)
    forms = {'': images, 'nhwc': digits, 'nchw': digits.permute(0, 3, 1, 2).contiguous()}
    logits = {form: export.open_onnx(check(model, given, tmp_path, preprocessing=form)).run(None, {'images': given.numpy()})[0] for form, given in forms.items()}
    for form in ('nhwc', 'nchw'): assert np.allclose(logits[form], logits[''], atol=1e-4)


def test_nothing_of_the_exporting_machine_is_in_the_file(digits, tmp_path):
    model, _ = made('repvgg_m0', digits)
    for inside in ({}, {'preprocessing': 'nchw'}):
        content = export.export_onnx(model, tmp_path/'model.onnx', SIZE, **inside).read_bytes()
        assert b'.py"' not in content and b'site-packages' not in content and str(tmp_path).encode() not in content


def test_layers_keep_their_names_when_more_is_inside(digits, tmp_path):
    from aaai_lt.hardware.cost import cost
    model, _ = made('repvgg_m0', digits)
    plain = cost(export.export_onnx(model, tmp_path/'plain.onnx', SIZE), SIZE)
    assert [n for n in plain[plain.macs > 0].layer] == [n for n in cost(model, SIZE).query('macs > 0').layer]
    import onnx
    names = [{t.name for t in onnx.load(export.export_onnx(model, tmp_path/'m.onnx', SIZE, **inside)).graph.initializer if len(t.dims) > 1 and t.name.endswith('.weight')} for inside in ({}, {'preprocessing': 'nhwc'})]
    assert names[0] == names[1] and len(names[0]) == (plain.macs > 0).sum()


def test_linear_layers_have_their_names_back(digits, tmp_path):
    "torch transposes their kernels and forgets the names; and the kernel of a cosine head is computed."
    from aaai_lt.hardware.cost import cost
    for inside in ({}, {'preprocessing': 'nchw'}):
        model, _ = made('vit_tiny_patch16_224', digits, 'cosine', depth=2)
        import onnx
        file = export.export_onnx(model, tmp_path/'m.onnx', SIZE, **inside)
        names = {t.name for t in onnx.load(file).graph.initializer}
        expected = {f'backbone.blocks.{i}.{part}.weight' for i in (0, 1) for part in ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')} | {'backbone.patch_embed.proj.weight', 'head.weight'}
        assert expected <= names
        if not inside: assert {'blocks.1.attn.qkv', 'blocks.0.mlp.fc2', 'head'} <= set(cost(file, SIZE).layer)


def test_bad_options_and_a_wrong_file(digits, tmp_path):
    model, images = made('repvgg_m0', digits)
    with pytest.raises(ConfigError, match="preprocessing is 'NHWC'"): export.export_onnx(model, tmp_path/'m.onnx', SIZE, preprocessing='NHWC')
    with pytest.raises(ConfigError, match="activation is 'relu'"): export.Shipped(model, '', 'relu')
    file = export.export_onnx(model, tmp_path/'m.onnx', SIZE)
    with torch.no_grad(): model.head.fc.bias[0] += 1e-2 * model(images).abs().max()
    with pytest.raises(DataError, match='Do not ship it'): export.check_export(export.compare(model, file, images))


@pytest.mark.parametrize('location', ['../secret', 'inside/../../secret', 'absolute', 'link'])
@pytest.mark.parametrize('given', ['file', 'bytes'])
def test_weights_outside_the_folder_are_not_read(tmp_path, monkeypatch, location, given):
    "A file that keeps its weights elsewhere: beside it they may lie, above it or behind a link they are not read."
    import onnx
    folder, values = tmp_path/'model', np.arange(4, dtype='float32')
    (folder/'inside').mkdir(parents=True)
    for place in (tmp_path/'secret', folder/'inside'/'own'): values.tofile(place)
    (folder/'link').symlink_to(tmp_path/'secret')
    monkeypatch.chdir(folder)  # for a model without a file of its own
    def model(at):
        weights = onnx.TensorProto(name='w', data_type=onnx.TensorProto.FLOAT, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in {'location': at, 'length': '16'}.items(): weights.external_data.add(key=key, value=value)
        ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in 'xy']
        graph = onnx.helper.make_graph([onnx.helper.make_node('Add', ['x', 'w'], ['y'])], 'sum', ports[:1], ports[1:], [weights])
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=9).SerializeToString()
    file = folder/'model.onnx'
    file.write_bytes(model('inside/own'))
    assert (export.open_onnx(file).run(None, {'x': values})[0] == 2 * values).all()
    file.write_bytes(model(str(tmp_path/'secret') if location == 'absolute' else location))
    with pytest.raises(Exception, match='External data path validation failed'): export.open_onnx(file if given == 'file' else file.read_bytes())
