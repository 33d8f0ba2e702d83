"Pre-training: what is hidden stays hidden, only it counts, a killed run goes on bit for bit; and what fine-tuning a transformer needs."
import numpy as np
import pytest
import timm
import torch
from helpers import Child, launched, noise
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from aaai_lt.core import ConfigError, DataError
from aaai_lt.data.augment import draws
from aaai_lt.models.zoo import make_backbone, make_model
from aaai_lt.training import loop, pretrain
from aaai_lt.training.config import make_config, quick_config
from aaai_lt.training.prepare import prepare
from aaai_lt.training.run import Run
from aaai_lt.training.stages import begin

VIT = {'model': 'vit_tiny_patch16_224', 'model_options': {'patch_size': 8, 'embed_dim': 32, 'depth': 2, 'num_heads': 2}, 'input_size': 32}
SWIN = {'model': 'swinv2_tiny_window8_256', 'model_options': {'embed_dim': 24, 'depths': [1, 1], 'num_heads': [2, 4], 'window_size': 4}, 'input_size': 32}
MAE = VIT | {'pretrain': 'mae', 'pretrain_options': {'width': 32, 'depth': 1, 'heads': 2}, 'device': 'cpu'}
SIMMIM = SWIN | {'pretrain': 'simmim', 'device': 'cpu'}
BOTH = pytest.mark.parametrize('settings', [MAE, SIMMIM], ids=['mae', 'simmim'])


def masked(settings, **more):
    "A fresh model to pre-train."
    config = make_config(**settings | more)
    torch.manual_seed(0)
    return pretrain.pretraining_model(make_model(config.model, 10, input_size=config.input_size, **config.model_options), config).eval()


# -- masks

@given(st.integers(0, 2 ** 31), st.integers(-1, 2000), st.integers(2, 300), st.floats(0.01, 0.99))
def test_masks_have_the_ratio_exactly(seed, epoch, patches, ratio):
    masks = pretrain.random_masks(seed, epoch, np.arange(7), patches, ratio)
    share = masks.float().mean(1)
    assert masks.dtype == torch.bool and masks.shape == (7, patches) and len(set(share.tolist())) == 1
    assert 0 < share[0] < 1 and (abs(share[0] - ratio) <= 1 / patches + 1e-6)
    assert torch.equal(masks[[4, 1]], pretrain.random_masks(seed, epoch, np.array([4, 1]), patches, ratio))  # of the place alone, whatever the batch


def test_masks_of_the_papers():
    assert pretrain.hidden_count(196, 0.75) == 147 and pretrain.hidden_count(36, 0.6) == 22  # 14² patches of MAE; 6² squares of SimMIM at 192 px


def test_masks_differ_and_cover_all():
    masks = pretrain.random_masks(0, 0, np.arange(4000), 16, 0.75)
    assert len(masks.unique(dim=0)) > 1500  # of 1,820 that there are
    assert (masks.float().mean(0) - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5
    for other in ({'seed': 1}, {'epoch': 1}, {'epoch': -1}): assert not torch.equal(masks, pretrain.random_masks(**{'seed': 0, 'epoch': 0} | other, positions=np.arange(4000), patches=16, ratio=0.75))


def test_masks_do_not_follow_the_augmentation():
    "The numbers that choose the crop say nothing about the mask: every correlation is within chance."
    n = 4000
    u, masks = draws(0, 3, np.arange(n), 24), pretrain.random_masks(0, 3, np.arange(n), 24, 0.5).float()
    correlation = np.corrcoef(torch.cat([u, masks], 1).numpy().T)[:24, 24:]
    assert abs(correlation).max() < 5 / n ** 0.5


# -- what is seen, and what counts

@BOTH
def test_hidden_pixels_are_not_seen(settings):
    model, images = masked(settings), torch.randn(5, 3, 32, 32)
    masks = model.masks(0, 0, np.arange(5))
    hidden = pretrain.join_patches(masks[:, :, None].expand(-1, -1, model.patch ** 2 * 3), model.grid)
    other = torch.where(hidden, 9 * torch.randn(5, 3, 32, 32), images)
    with torch.no_grad():
        assert torch.equal(model.reconstruct(other, masks), model.reconstruct(images, masks))
        for place in range(masks.shape[1]):  # and every visible patch is
            if masks[0, place]: continue
            one = pretrain.cut_patches(images, model.patch)
            one[0, place] += 1
            assert not torch.equal(model.reconstruct(pretrain.join_patches(one, model.grid), masks)[0], model.reconstruct(images, masks)[0])


def test_the_encoder_is_a_vit_on_fewer_tokens(monkeypatch):
    "With nothing left out the tokens are timm's own; class and register tokens come along."
    for name, options in (('vit_tiny_patch16_224', VIT['model_options']), ('test_vit2', {'patch_size': 8}), ('vit_base_patch16_clip_224', VIT['model_options'])):
        model = pretrain.MAE(make_backbone(name, input_size=32, **options), width=32, depth=1, heads=2).eval()
        images, masks = torch.randn(2, 3, 32, 32), model.masks(0, 0, np.arange(2))
        prefix, seen, visible = model.encode(images, masks)
        assert prefix.shape[1] == model.backbone.num_prefix_tokens and seen.shape[1] == 4 and not masks.gather(1, visible).any()
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, 'hidden_count', lambda patches, ratio: 0)
            whole = torch.cat(model.encode(images, torch.zeros_like(masks))[:2], 1)
        assert torch.allclose(whole, model.backbone.forward_features(images), atol=1e-5)


@BOTH
def test_only_hidden_patches_count(settings):
    "The error against plain loops over pixels; and its gradient is 0 for every visible patch."
    model, images = masked(settings), torch.randn(3, 3, 32, 32)
    masks, p = model.masks(0, 0, np.arange(3)), model.patch
    with torch.no_grad(): predicted, errors = model.reconstruct(images, masks), model(images, masks)
    for i in range(3):
        each = []
        for place in np.flatnonzero(masks[i]):
            row, column = divmod(int(place), model.grid[1])
            true = images[i, :, row * p:(row + 1) * p, column * p:(column + 1) * p].permute(1, 2, 0).reshape(-1).double().numpy()
            if settings is MAE: true = (true - true.mean()) / np.sqrt(true.var(ddof=1) + 1e-6)
            each.append(np.mean(np.abs(predicted[i, place].double().numpy() - true) ** (2 if settings is MAE else 1)))
        assert np.isclose(errors[i].item(), np.mean(each), rtol=1e-5)
    predicted.requires_grad_()
    pretrain.hidden_error(predicted, model.target(images), masks, model.distance).sum().backward()
    assert torch.equal(predicted.grad.abs().sum(2) > 0, masks)


def test_every_parameter_that_learns_has_a_gradient():
    "Else several processes would wait for each other; models that pool the mean have no norm before it."
    for settings in (MAE, SIMMIM, MAE | {'model_options': VIT['model_options'] | {'global_pool': 'avg'}}, MAE | {'model_options': VIT['model_options'] | {'global_pool': 'avg', 'final_norm': False}}):
        model = masked(settings)
        model(torch.randn(2, 3, 32, 32), model.masks(0, 0, np.arange(2))).mean().backward()
        assert not [n for n, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]


@pytest.mark.parametrize('settings, reason', [
    (MAE | {'model': 'resnet18', 'model_options': {}}, 'resnet18 is of resnet'), (MAE | SWIN, 'vision_transformer'), (SIMMIM | VIT, 'swin_transformer_v2'), (MAE | {'select': 'accuracy'}, "select='last'"), (MAE | {'augment_options': {'mixup': 0.8}}, 'mixup'),
    (MAE | {'pretrain_options': {'mask_ratio': 1.0}}, 'mask_ratio'), (MAE | {'pretrain_options': {'with': 1}}, 'width'), (VIT | {'pretrain_options': {'width': 8}}, 'without pretrain'), (MAE | {'pretrain': 'mea'}, 'mae'),
    (MAE | {'pretrain_options': {'unlabelled': 1}}, 'unlabelled'), (VIT | {'layer_decay': 1.5}, 'at most 1'), (VIT | {'optimizer_options': {'beta': 1}}, 'beta'),
])
def test_wrong_settings(settings, reason):
    with pytest.raises(ConfigError, match=reason): make_config(**settings)


def test_models_that_do_not_fit():
    with pytest.raises(ConfigError, match='HybridEmbed'): pretrain.MAE(make_backbone('vit_tiny_r_s16_p8_224', input_size=32))  # its patches have seen each other
    with pytest.raises(ConfigError, match='multiple'): masked(SIMMIM | {'model_options': {'embed_dim': 24, 'window_size': 2}})  # one square of 32 px
    with pytest.raises(ConfigError, match='multiple of 4'): masked(MAE | {'pretrain_options': {'width': 30, 'heads': 2}})


# -- runs

def kept(folder):
    "The weights, the history without its seconds, and the tensors of the last checkpoint."
    from aaai_lt.training.checkpoint import load_checkpoint
    return (folder/'best.safetensors').read_bytes(), Run(folder).history.drop(columns='seconds').to_csv(), {n: t.numpy().tobytes() for n, t in load_checkpoint(folder/'checkpoint')[1].items()}


@BOTH
def test_a_killed_pretraining_goes_on_bit_for_bit(home, settings, tmp_path_factory):
    words = ['epochs=4', 'warmup_epochs=1', 'batch_size=64', 'save_every=2', 'ema=0.9', 'name=x', *(f'{k}={v}' for k, v in settings.items())]
    other = tmp_path_factory.mktemp('whole')
    whole = Child(other, launched, *words)
    assert whole.wait() == 0, whole.text()
    first = Child(home, launched, *words)
    first.wait_for(lambda: (home/'outputs'/'x'/'checkpoint'/'step-00000004').exists())
    first.kill()
    assert not Run(home/'outputs'/'x').finished, 'the kill came too late to show anything'
    second = Child(home, launched, *words)
    assert second.wait() == 0 and 'continuing x' in second.text(), second.text()
    assert kept(home/'outputs'/'x') == kept(other/'outputs'/'x')


def test_two_processes_learn_as_one(home):
    "Each image has its mask whichever process it goes to, and both wait for the same gradients."
    from test_distributed import together
    words = [*(f'{k}={v}' for k, v in MAE.items()), 'data=digits', 'epochs=2', 'batch_size=64', 'warmup_epochs=0', 'optimizer=sgd', 'lr=0.05', 'weight_decay=0', 'workers=1']
    for name, world in (('one', 1), ('two', 2)):
        codes, texts = together(home, *words, f'name={name}', world=world)
        assert codes == [0] * world, texts
    one, two = (Run(home/'outputs'/name) for name in ('one', 'two'))
    np.testing.assert_allclose(two.history[['train_loss', 'val_loss']], one.history[['train_loss', 'val_loss']], rtol=1e-3)
    a, b = (pretrain.load_pretraining(run).state_dict() for run in (one, two))
    assert max((a[n] - b[n]).abs().max() for n in a) < 1e-3


def test_a_stage_of_pretraining_gives_the_next_its_backbone(home):
    config = make_config(name='two', **VIT, epochs=3, device='cpu', stages=[{'pretrain': 'mae', 'pretrain_options': MAE['pretrain_options'], 'epochs': 6}, {'start': 'previous', 'layer_decay': 0.75}])
    said = []
    run = loop.train(config, say=said.append)
    first = Run(home/'outputs'/'two-1')
    assert first.summary['pretrain'] == 'mae' and first.history.val_loss.iloc[-1] < first.history.val_loss.iloc[0] and 'train_accuracy' not in first.history
    assert run.finished and run.config.start == 'two-1' and len(run.history) == 3 and not [line for line in said if 'nan' in line]
    model = make_model('vit_tiny_patch16_224', 10, input_size=32, **VIT['model_options'])
    begin(model, run.config)
    learned = pretrain.load_pretraining(first)
    assert all(torch.equal(t, model.backbone.state_dict()[n]) for n, t in learned.backbone.state_dict().items())
    with pytest.raises(ConfigError, match='no pre-training'): pretrain.load_pretraining(run)
    from aaai_lt.training.evaluate import evaluate
    with pytest.raises(ConfigError, match='start=two-1'): evaluate(first)


def test_pretraining_begins_where_it_is_told(home):
    "With start it takes over positions and all; without, backbones are the same with and without pre-training, but for MAE's positions."
    base = make_model('vit_tiny_patch16_224', 10, input_size=32, **VIT['model_options'])
    torch.save(base.state_dict(), home/'base.pth')
    data = prepare(make_config(**VIT), progress=False)
    started = loop.make_trainer(make_config(**MAE, start=str(home/'base.pth')), data, home/'a').plain.backbone
    assert all(torch.equal(t, started.state_dict()[n]) for n, t in base.backbone.state_dict().items())
    fresh, plain = (loop.make_trainer(make_config(**settings), data, home/'b').plain.backbone.state_dict() for settings in (MAE, VIT | {'device': 'cpu'}))
    assert [n for n in fresh if not torch.equal(fresh[n], plain[n])] == ['pos_embed']


def test_another_input_size_afterwards(home):
    "224 px, then 448: the positions are resampled, everything else is taken as it is."
    torch.save(masked(MAE).state_dict(), home/'mae.pth')
    config = make_config(**VIT | {'input_size': 64}, start=str(home/'mae.pth'))
    model = make_model(config.model, 10, input_size=64, **config.model_options)
    begin(model, config)
    old, new = masked(MAE).backbone.pos_embed, model.backbone.pos_embed
    assert new.shape[1] == 65 and torch.equal(new[:, 0], old[:, 0])
    assert (F.interpolate(new[:, 1:].view(1, 8, 8, -1).permute(0, 3, 1, 2), (4, 4), mode='area').permute(0, 2, 3, 1).reshape(1, 16, -1) - old[:, 1:]).abs().mean() < 0.1 * old.abs().mean()


def test_images_without_labels(home):
    "Every image under the folder, to any depth, with a part held out; unreadable ones are listed; the probe asks for labels."
    for i in range(40): noise(home/'images'/('deep/er' if i % 2 else 'test')/f'{i}.png', i)
    (home/'images'/'broken.png').write_bytes(b'no image')
    config = make_config(**MAE | {'pretrain_options': MAE['pretrain_options'] | {'unlabelled': True}}, data=str(home/'images'), epochs=1, warmup_epochs=0, select='last', name='u')
    data = prepare(config, progress=False)
    assert {n: len(s) for n, s in data.splits.items()} == {'train': 36, 'val': 4} and list(data.table.problems.path) == ['broken.png']
    run = loop.train(config, data=data, say=lambda text: None)
    assert run.finished and run.summary['val_loss'] > 0
    with pytest.raises(DataError, match='two classes'): pretrain.linear_probe(run, data)
    assert pretrain.plot_reconstruction(run, data, count=3).axes


@pytest.mark.recipes
def test_quick_papermill(home):
    "The stages of a recipe in quick form, with pictures and a probe in the report."
    from test_train import papermill, report
    code, output = papermill(home, 'train.ipynb', '-p', 'quick', 'True', '-p', 'name', 'q', '-p', 'model', 'vit_large_patch16_224', '-y', 'stages: [{pretrain: mae, select: last, epochs: 20}, {start: previous}]')
    assert code == 0, output[-3000:]
    text = report(home)
    assert 'a linear classifier on the frozen features of q-1' in text and 'mae: error of what was hidden' in text and 'finished: quick run' in text


# -- fine-tuning

def rates(groups, model):
    "(rate, whether it decays) of each parameter by name."
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)].removeprefix('backbone.'): (round(g.get('lr_scale', 1.0), 9), g['weight_decay'] > 0) for g in groups for p in g['params']}


@pytest.mark.parametrize('name, options', [('vit_tiny_patch16_224', {'embed_dim': 32, 'depth': 4, 'num_heads': 2}), ('vit_tiny_patch16_224', {'embed_dim': 32, 'depth': 3, 'num_heads': 2, 'global_pool': 'avg'}), ('swinv2_tiny_window8_256', {'embed_dim': 24, 'depths': (1, 2), 'num_heads': (2, 4)}), ('convnext_atto', {})])
def test_layer_decay_is_timms(name, options):
    "Rate and decay of every parameter are those of timm's own groups of the whole classifier; only biases of ours never decay."
    from timm.optim import param_groups_layer_decay
    ours, theirs = make_model(name, 7, **options), timm.create_model(name, num_classes=7, **options)
    expected = rates(param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay() if hasattr(theirs, 'no_weight_decay') else (), layer_decay=0.75), theirs)
    found = rates(loop.decay_groups(ours, 0.05, 'kernels', 0.75), ours)
    head = {n: v for n, v in expected.items() if n.startswith('head') and n.endswith(('fc.weight', 'fc.bias', 'head.weight', 'head.bias'))}
    assert {v[0] for v in head.values()} == {1.0} and found['head.fc.weight'] == (1.0, True) and found['head.fc.bias'] == (1.0, False)
    assert {n: v for n, v in found.items() if not n.startswith('head.fc')} == {n: v for n, v in expected.items() if n not in head}
    assert not any(v[1] for n, v in found.items() if any(word in n for word in ('pos_embed', 'cls_token', 'norm', 'bias', 'cpb_mlp', 'logit_scale')))


def test_layer_decay_reaches_the_steps(home):
    "The first step of SGD moves each layer by its share of the gradient."
    config = make_config(**VIT, layer_decay=0.5, optimizer='sgd', optimizer_options={'momentum': 0.0, 'nesterov': False}, lr=0.1, weight_decay=0, warmup_epochs=0, device='cpu', augment='none', augment_options={})
    trainer = loop.make_trainer(config, prepare(config, progress=False), home/'run')
    before = {n: p.detach().clone() for n, p in trainer.plain.named_parameters()}
    seen = {}
    trainer.optimizer.optimizer.register_step_pre_hook(lambda *_: seen.update({n: p.grad.clone() for n, p in trainer.plain.named_parameters()}))
    loop.train_step(trainer, [(0, np.arange(16))])
    for name, scale in (('backbone.patch_embed.proj.weight', 0.125), ('backbone.blocks.0.mlp.fc1.weight', 0.25), ('backbone.blocks.1.mlp.fc1.weight', 0.5), ('head.fc.weight', 1.0)):
        moved = before[name] - dict(trainer.plain.named_parameters())[name].detach()
        assert torch.allclose(moved, 0.1 * scale * seen[name], atol=1e-6)


def test_mean_of_patch_tokens_without_a_norm():
    "What `global_pool: avg, final_norm: False` of timm is: the mean over patch tokens behind the last block, the class token left out."
    options = VIT['model_options'] | {'global_pool': 'avg', 'final_norm': False}
    vit = make_backbone('vit_tiny_patch16_224', input_size=32, **options).eval()
    images, last = torch.randn(2, 3, 32, 32), {}
    vit.blocks[-1].register_forward_hook(lambda module, given, out: last.update(tokens=out))
    with torch.no_grad(): features = vit(images)
    assert vit.cls_token is not None and last['tokens'].shape[1] == 17 and torch.allclose(features, last['tokens'][:, 1:].mean(1), atol=1e-6)
    normed = make_backbone('vit_tiny_patch16_224', input_size=32, **VIT['model_options'], global_pool='avg')
    assert isinstance(normed.norm, torch.nn.Identity) and isinstance(normed.fc_norm, torch.nn.LayerNorm)  # without final_norm=False there is one behind the mean


def test_reduction_trains_and_ships(home):
    "A head with a LinearReduction in a run: trained, judged, exported as one linear layer."
    import onnx
    from aaai_lt.hardware.export import export_run
    config = make_config(name='neck', model='repvgg_n1', input_size=32, head='arcface', head_options={'reduction': 8, 'activation': 'relu', 'sub_centers': 3, 'margin': 'adaptive'}, loss='soft_eql', epochs=2, device='cpu')
    data = prepare(config, progress=False)
    run = loop.train(config, data=data, say=lambda text: None)
    assert (export_run(run, data.table).agreement >= 0.999).all()
    assert not [node for node in onnx.load(run.folder/'model.onnx').graph.node if node.op_type == 'BatchNormalization']


def test_quick_keeps_the_family():
    for model, small in (('vit_large_patch16_224', 'vision_transformer'), ('swinv2_large_window12to24_192to384', 'swin_transformer_v2')):
        config = quick_config(make_config(data='', model=model, quick=True))
        assert timm.model_entrypoint(config.model).__module__.endswith(small)
        assert sum(p.numel() for p in make_model(config.model, 10, input_size=32, **config.model_options).parameters()) < 300_000
