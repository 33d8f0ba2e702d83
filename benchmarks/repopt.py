"""RepOpt beside RepVGG: the time of a training step, and the accuracy on the traffic signs; rows to results/repopt.csv.

  step      forward, loss, backward and optimizer on one batch in memory; RepVGG, the RepOpt target with its multipliers, the search (hs),
            and the target's network without multipliers (plain), interleaved in one process, so that the ratios hold on a noisy machine
  accuracy  the same network, images and budget: RepVGG, the target with searched scales (the search is a stage of its own, on the same
            training images), the target with the initial scales, and the plain network; seed by seed, resumable

The budget of accuracy was written down before its first run: blocks 1, 2, 2, 1 of half the widths (0.6 M parameters), 64 px, 16 epochs (10
for the search), one thread; else the recipe of the traffic signs before boxes (common.WHOLE_SIGNS), and the authors' decay for RepVGG. Expected: target with searched scales
within half a point of RepVGG, initial scales a little below, plain last. The runs stay, so that benchmarks/int8.py can quantise them.

  python benchmarks/repopt.py step [--rounds 9] [--settings small middle]
  python benchmarks/repopt.py accuracy --data ../shared/data/gtsrb [--seeds 3]"""
import argparse
import time

import numpy as np
import torch
from common import WHOLE_SIGNS, machine, write_rows
from torch.nn import functional as F

from aaai_lt.core import recipe
from aaai_lt.models.repopt import apply_scales
from aaai_lt.models.zoo import make_model, memory_format
from aaai_lt.training.config import make_config
from aaai_lt.training.loop import make_optimizer, train

SETTINGS = {'small': ('n1', 64, 128), 'middle': ('a0', 112, 64), 'large': ('b1', 224, 64)}  # variant, input size, batch
KINDS = {'RepVGG': ('repvgg', ''), 'target': ('', 'initial'), 'search': ('hs', ''), 'plain': ('', 'none')}  # mode, scales


def make_step(variant, mode, scales, size, batch, device, precision):
    "A function that takes one training step."
    name = '_'.join(filter(None, ('repopt', variant, mode)))
    torch.manual_seed(0)
    model = make_model(name, 89)
    if scales == 'initial': apply_scales(model.backbone, None)
    layout = memory_format(model, device)
    model = model.to(device, memory_format=layout).train()
    optimizer = make_optimizer(model, make_config(model=name, scales=scales, optimizer='sgd', lr=0.01, weight_decay=4e-5))
    images, labels = torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=layout), torch.randint(89, (batch,), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16'): loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step, str(layout).removeprefix('torch.')


def measure_steps(name, rounds, precision):
    "Milliseconds of a step, a row for each kind: median, lowest, highest; and RepVGG's time divided by it, round by round."
    (variant, size, batch), device = SETTINGS[name], torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    steps, layouts, times = {}, {}, {kind: [] for kind in KINDS}
    for kind, (mode, scales) in KINDS.items(): steps[kind], layouts[kind] = make_step(variant, mode, scales, size, batch, device, precision)
    for step in steps.values(): step(); step()
    count = {'cpu': 3, 'cuda': 30}[device.type]
    for _ in range(rounds):
        for kind, step in steps.items():
            if device.type == 'cuda': torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(count): step()
            if device.type == 'cuda': torch.cuda.synchronize()
            times[kind].append((time.perf_counter() - began) / count * 1000)
    rows = []
    for kind, spent in times.items():
        ratio = np.array(times['RepVGG']) / np.array(spent)
        rows.append({'benchmark': 'step', 'setting': name, 'kind': kind, 'seed': 0, 'model': variant, 'input_size': size, 'batch': batch, 'precision': precision, 'ms': round(float(np.median(spent)), 2), 'lowest': round(min(spent), 2), 'highest': round(max(spent), 2),
                     'rounds': rounds, 'times_as_fast': round(float(np.median(ratio)), 3), 'ratio_lowest': round(ratio.min(), 3), 'ratio_highest': round(ratio.max(), 3), 'layout': layouts[kind], 'threads': torch.get_num_threads(), 'machine': machine()})
        print(f'{name} {kind}: {np.median(spent):.1f} ms, {np.median(ratio):.2f} times as fast as RepVGG ({ratio.min():.2f} to {ratio.max():.2f})', flush=True)
    return rows


def accuracy_runs(data, seed):
    "The configs that are compared: kind -> Config."
    options = {'blocks': [1, 2, 2, 1], 'widths': [0.5, 0.5, 0.5, 0.5]}
    common = recipe('gtsrb') | WHOLE_SIGNS | {'data': data, 'seed': seed, 'model_options': options, 'input_size': 64, 'store_size': 64, 'epochs': 16}
    search = {'model': 'repopt_s0_hs', 'model_options': options, 'epochs': 10}
    kinds = {'RepVGG': {'model': 'repopt_s0_repvgg', 'weight_decay_rule': 'repvgg'}, 'target': {'stages': [search, {'model': 'repopt_s0', 'scales': 'previous'}]},
             'target, initial scales': {'model': 'repopt_s0', 'scales': 'initial'}, 'plain': {'model': 'repopt_s0', 'scales': 'none'}}
    return {kind: make_config(**common | settings | {'name': f'repopt-{kind.replace(", ", "-").replace(" ", "-").lower()}-{seed}'}) for kind, settings in kinds.items()}


def measure_accuracy(data, seeds):
    "One row for each kind and seed, from runs that are finished or trained now."
    torch.set_num_threads(1)
    for seed in range(seeds):
        for kind, config in accuracy_runs(data, seed).items():
            run = train(config)
            split = 'test' if 'test' in run.summary else 'val'
            row = {'benchmark': 'accuracy', 'setting': 'gtsrb', 'kind': kind, 'seed': seed, 'model': run.config.model, 'input_size': run.data['input_size'], 'batch': run.config.batch_size, 'precision': run.config.precision,
                   'split': split, 'accuracy': run.summary[split]['accuracy'], 'balanced_accuracy': run.summary[split]['balanced_accuracy'], 'epochs': run.config.epochs, 'seconds': run.summary['seconds'], 'threads': torch.get_num_threads(), 'machine': machine()}
            write_rows('repopt.csv', [row], ['benchmark', 'setting', 'kind', 'seed', 'precision'])
            print(f'{kind}, seed {seed}: {row["accuracy"]:.2%} on {split}, {row["seconds"]:.0f} s', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['step', 'accuracy'])
    parser.add_argument('--data', help='for accuracy: the traffic signs')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--settings', nargs='*', default=['small', 'middle'], choices=list(SETTINGS))
    parser.add_argument('--precision', default='fp32', choices=['fp32', 'bf16'])
    args = parser.parse_args()
    if args.what == 'step':
        for name in args.settings: write_rows('repopt.csv', measure_steps(name, args.rounds, args.precision), ['benchmark', 'setting', 'kind', 'seed', 'precision', 'machine'])
    elif not args.data: parser.error('accuracy needs --data')
    else: measure_accuracy(args.data, args.seeds)
