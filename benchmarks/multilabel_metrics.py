"""Average precision beside scikit-learn's, class by class, interleaved in one process, in processor time; and the memory of a large case. Rows to results/multilabel_metrics.csv.

  python benchmarks/multilabel_metrics.py [--images 100000] [--classes 60] [--rounds 3] [--memory-images 50000] [--memory-classes 5000]

A class has `prevalence` of its entries positive; `levels` is how many different scores there are (0: all differ). `difference` is the largest
gap to scikit-learn over all classes. The large case runs in a process of its own; `peak_gib` is that process's resident peak, input included."""
import argparse
import subprocess
import sys
import time

import numpy as np
from common import machine, write_rows
from sklearn.metrics import average_precision_score

from aaai_lt.training.multilabel import average_precision, per_class_multilabel, summarise_multilabel

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, value in (('images', 100_000), ('classes', 60), ('rounds', 3), ('memory-images', 50_000), ('memory-classes', 5000)): parser.add_argument(f'--{name}', type=int, default=value)
parser.add_argument('--only-memory', action='store_true', help='the large case alone, in this process')
args = parser.parse_args()
KEY = ['machine', 'case', 'images', 'classes', 'dtype', 'prevalence', 'levels']


def made(images, classes, dtype, prevalence, levels):
    random = np.random.default_rng(0)
    targets, scores = np.empty((images, classes), 'int8'), np.empty((images, classes), dtype)
    for start in range(0, images, 1000):  # so that making them takes no more memory than they do
        part = targets[start:start + 1000] = random.random((min(1000, images - start), classes)) < prevalence
        value = random.random(part.shape) + 0.3 * part
        scores[start:start + 1000] = np.round(value * levels) / levels if levels else value
    return targets, scores


def seconds(function):
    began = time.process_time()
    return function(), time.process_time() - began


def compare(dtype, prevalence, levels):
    targets, scores = made(args.images, args.classes, dtype, prevalence, levels)
    def ours(): return average_precision(targets, scores)
    def theirs(): return np.array([average_precision_score(targets[:, c], scores[:, c]) for c in range(args.classes)])
    times = {ours: [], theirs: []}
    for round_ in range(args.rounds):
        found = {}
        for function in (ours, theirs)[::1 if round_ % 2 else -1]:
            found[function], took = seconds(function)
            times[function].append(took)
    one, other = (np.median(times[f]) for f in (ours, theirs))
    return {'machine': machine(), 'case': 'average_precision', 'images': args.images, 'classes': args.classes, 'dtype': dtype, 'prevalence': prevalence, 'levels': levels, 'seconds': round(one, 3),
            'scikit_learn_seconds': round(other, 3), 'ratio': round(other / one, 2), 'difference': float(np.abs(found[ours] - found[theirs]).max()), 'rounds': args.rounds}


def large():
    import resource
    targets, scores = made(args.memory_images, args.memory_classes, 'float32', 0.01, 0)
    def all_metrics(): return summarise_multilabel(per_class_multilabel(targets, scores, range(args.memory_classes), targets.sum(0, dtype='int64')), targets, scores)
    summary, took = seconds(all_metrics)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    row = {'machine': machine(), 'case': 'table and summary', 'images': args.memory_images, 'classes': args.memory_classes, 'dtype': 'float32', 'prevalence': 0.01, 'levels': 0, 'seconds': round(took, 2), 'rounds': 1, 'peak_gib': round(peak, 2)}
    write_rows('multilabel_metrics.csv', [row], KEY)


if args.only_memory: large()
else:
    write_rows('multilabel_metrics.csv', [compare(*case) for case in (('float64', 0.1, 0), ('float32', 0.1, 0), ('float32', 0.01, 0), ('float32', 0.5, 0), ('float64', 0.1, 100), ('float64', 0.1, 2))], KEY)
    subprocess.run([sys.executable, __file__, '--only-memory', '--memory-images', str(args.memory_images), '--memory-classes', str(args.memory_classes)], check=True)
    import pandas as pd
    from common import RESULTS
    print(pd.read_csv(RESULTS/'multilabel_metrics.csv').drop(columns='machine').to_string(index=False))
