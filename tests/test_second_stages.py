"A second stage that trains a few numbers, and a student that learns a teacher's answers: what moves, what stays, and that both survive a stop."
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_faults import SETTINGS, check_resumes, quiet
from torch.nn import functional as F

from aaai_lt.core import ConfigError
from aaai_lt.losses.distillation import distillation
from aaai_lt.training import loop
from aaai_lt.training.config import make_config
from aaai_lt.training.stages import stage_configs, teacher_logits

SMALL = {'data': 'digits', 'epochs': 1, 'warmup_epochs': 0.0, 'model': 'repvgg_n1', 'input_size': 32, 'loss': 'cross_entropy', 'device': 'cpu', 'select': 'last'}


@pytest.mark.parametrize('head, moves', [('learnable_scale', 'head.scale'), ('tau_normalized', 'head.tau')])
def test_only_the_named_numbers_move(home, head, moves):
    loop.train(make_config(**SMALL, name='s', weight_decay=0.5, stages=[{}, {'start': 'previous', 'freeze': 'backbone', 'head': head, 'sampler': 'class_balanced'}]), say=quiet)
    one, two = (load_file(home/'outputs'/name/'best.safetensors') for name in ('s-1', 's'))
    assert all(torch.equal(value, two[name]) for name, value in one.items())  # the classifier's directions and the batch statistics too
    assert set(two) - set(one) == {moves} and not torch.equal(two[moves], torch.ones_like(two[moves]) if head == 'learnable_scale' else torch.zeros(()))


@pytest.mark.parametrize('temperature, power', [(1.0, 1.0), (4.0, 0.5)])
def test_distillation_by_hand(temperature, power):
    "Sums of p · log(p / q) over classes, in float64 and numpy."
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 6, 4)) * 3
    p = np.exp(teacher / temperature) ** power
    p /= p.sum(1, keepdims=True)
    q = np.exp(student / temperature)
    q /= q.sum(1, keepdims=True)
    expected = temperature ** 2 * (p * np.log(p / q)).sum() / 6
    assert distillation(torch.tensor(student), torch.tensor(teacher), temperature, power).item() == pytest.approx(expected, rel=1e-5)


def test_each_image_gets_its_own_answer(home):
    "The teacher's logits stand in the order of the student's training images, whatever order that is."
    run = loop.train(make_config(**SMALL, name='t'), say=quiet)
    data = loop.prepare(make_config(**SMALL), False)
    ids = data.splits['train'].ids
    config = make_config(**SMALL, teacher='t')
    said = teacher_logits(config, ids, data.table.classes)
    order = np.random.default_rng(0).permutation(len(ids))
    assert said.shape == (len(ids), 10) and np.array_equal(teacher_logits(config, ids[order], data.table.classes), said[order])
    assert (said.argmax(1) == data.splits['train'].labels).mean() == pytest.approx(run.history.train_accuracy.iloc[-1], abs=0.5)
    with pytest.raises(ConfigError, match='was not trained on nobody.png'): teacher_logits(config, [*ids, 'nobody.png'], data.table.classes)
    with pytest.raises(ConfigError, match='knows 10 classes'): teacher_logits(config, ids, data.table.classes[::-1])


def test_weight_one_learns_from_the_teacher_alone(home):
    loop.train(make_config(**SMALL, name='t'), say=quiet)
    config = make_config(**SMALL, name='u', teacher='t', teacher_options={'weight': 1.0, 'temperature': 2})
    trainer = loop.make_trainer(config, loop.prepare(config, False), home/'nowhere')
    logits, indices = torch.randn(5, 10), np.array([7, 1, 3, 0, 2])
    expected = 4 * F.kl_div((logits / 2).log_softmax(1), (trainer.taught[indices] / 2).softmax(1), reduction='batchmean')
    assert torch.allclose(loop.with_teacher(trainer, torch.tensor(99.0), logits, indices, 5), expected)


def test_students_resume(home):
    loop.train(make_config(**SETTINGS | {'name': 'base', 'epochs': 1, 'warmup_epochs': 0.0, 'loss': 'balanced_softmax'}), say=quiet)
    check_resumes(home, [3, 4], epochs=2, loss='balanced_softmax', teacher='base', teacher_options={'power': 0.5})


@pytest.mark.parametrize('settings, reason', [
    ({'teacher': 'x', 'augment_options': {'mixup': 0.2}}, 'mixup or cutmix'), ({'teacher': 'x', 'loss': 'eqlv2'}, "not for 'eqlv2'"), ({'teacher': 'x', 'loss': 'bce'}, "not for 'bce'"),
    ({'teacher_options': {'wait': 1}}, 'did you mean'), ({'teacher_options': {'weight': 1.5}}, 'at most 1'),
])
def test_mistakes_are_found_before_anything_is_read(settings, reason):
    with pytest.raises(ConfigError, match=reason): make_config(**SMALL | settings)


def test_a_teacher_that_is_not_there(home):
    with pytest.raises(ConfigError, match='teacher'): loop.train(make_config(**SMALL, name='v', teacher='nobody'), say=quiet)
    assert stage_configs(make_config(**SMALL, name='w', stages=[{}, {'teacher': 'previous'}]))[-1].teacher == 'w-1'
