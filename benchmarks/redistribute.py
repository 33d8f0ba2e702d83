"""What redistributing labels gains where the test set is balanced, what the test of balance saves where it is not, and what the transport costs; rows to results/redistribute.csv.

  python benchmarks/redistribute.py accuracy outputs/digits-ce-0 [more runs]
  python benchmarks/redistribute.py speed [--images 100000] [--classes 5000]"""
import argparse
import resource
import time

import numpy as np
import torch
from common import machine, write_rows

from aaai_lt.data.predictions import Predictions
from aaai_lt.ensemble.blend import fold_of
from aaai_lt.ensemble.redistribute import balance_test, calibrate, estimate_prior, redistribute, shares_in, transport
from aaai_lt.training.run import load_run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('what', choices=['accuracy', 'speed'])
parser.add_argument('runs', nargs='*')
parser.add_argument('--images', type=int, default=100_000)
parser.add_argument('--classes', type=int, default=5_000)
args = parser.parse_args()


def part(predictions, rows):
    return Predictions(predictions.scores[rows], predictions.ids[rows], predictions.classes, predictions.targets[rows], predictions.meta)


def parts(run):
    "Pairs of (calibration, test): validation and test, or the two halves of validation, each in turn."
    val = run.predictions('val')
    if 'test' in run.summary: return {'test': (val, run.predictions('test'))}
    fold = fold_of(val.targets, 2)
    return {f'half {f} of val': (part(val, fold != f), part(val, fold == f)) for f in (0, 1)}


def ways(test, calibration, verdict, counts):
    "name -> (method, options, the balance that gates it)."
    n, c = test.scores.shape
    sure = calibrate(test, calibration)
    prior = estimate_prior(sure.scores, shares_in(calibration, counts))
    least = int(0.9 * n / c)  # a bit under images / classes, as the winners say
    return {'argmax': ('transport', {'strength': 0.0}, None), 'winners': ('winners', {'least': least}, None), 'winners protected': ('winners_protected', {'least': least}, None),
            'winners second version': ('winners_both', {'least': least, 'most': int(1.1 * n / c) + 1}, None), 'transport': ('transport', {}, None), 'exact': ('exact', {}, None),
            'transport if balanced': ('transport', {}, verdict), 'transport to the estimated prior': ('transport', {'prior': prior}, None)}


def accuracy(name):
    run = load_run(name)
    counts = np.array(run.data['class_counts'])
    for split, (calibration, test) in parts(run).items():
        verdict = balance_test(test, calibration, counts)
        for way, (method, options, gate) in ways(test, calibration, verdict, counts).items():
            labels, report = redistribute(test, method, balance=gate, **options)
            yield {'benchmark': 'accuracy', 'data': run.data['name'], 'run': run.name, 'split': split, 'way': way, 'images': len(test), 'classes': len(test.classes), 'accuracy': (labels == test.targets).mean(), 'moved': int(report.gained.sum()),
                   'balance': verdict['balance'], 'verdict': verdict['verdict'], 'machine': machine()}


def speed(images, classes):
    "Softmax scores of a tailed classifier on a balanced test set, made in place, block by block."
    random = np.random.default_rng(0)
    p, bias = np.empty((images, classes), 'float32'), np.linspace(0, -4, classes, dtype='float32')
    truth = random.integers(0, classes, images)
    for a in range(0, images, 2048):
        block = random.standard_normal((min(2048, images - a), classes), dtype='float32') + bias
        block[np.arange(len(block)), truth[a:a + 2048]] += 5
        np.exp(block, out=block)
        p[a:a + 2048] = block / block.sum(1, keepdims=True)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    wall, cpu = time.perf_counter(), time.process_time()
    labels = transport(p, np.ones(classes))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    counts = np.bincount(labels, minlength=classes)
    yield {'benchmark': 'speed', 'data': 'drawn', 'run': '', 'split': '', 'way': 'transport', 'images': images, 'classes': classes, 'accuracy': (labels == truth).mean(), 'argmax_accuracy': (p.argmax(1) == truth).mean(), 'fewest': counts.min(), 'most': counts.max(), 'mean_off': np.abs(counts - images / classes).mean(),
           'seconds': wall, 'cpu_seconds': cpu, 'peak_GiB': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 'scores_GiB': p.nbytes / 2**30, 'peak_before_GiB': held, 'threads': torch.get_num_threads(), 'machine': machine()}


rows = [row for name in args.runs for row in accuracy(name)] if args.what == 'accuracy' else list(speed(args.images, args.classes))
table = write_rows('redistribute.csv', [{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows], ['benchmark', 'data', 'run', 'split', 'way', 'images', 'classes'])
if args.what == 'accuracy':
    mine = table[table.run.isin([row['run'] for row in rows])]
    print(mine.pivot_table(index='way', columns=['run', 'split'], values='accuracy', sort=False).round(4).to_string())
    print(mine.drop_duplicates(['run', 'split'])[['run', 'split', 'balance', 'verdict']].to_string(index=False))
else: print({k: v for k, v in rows[0].items() if v != ''})
