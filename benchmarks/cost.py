"""How long counting takes, beside torch's own counter on real weights; rows to results/cost.csv.

  cost        `cost(name, …)`: build on the meta device, run, count; median of the rounds after one that is not counted
  first       the same in a fresh process, imports apart
  flop_counter  torch.utils.flop_counter on the model built with weights, as one would do without this package;
               RepVGG is counted as it trains, and the CPU's fused attention is not counted at all: the macs differ by that
  search      `search_fit` over all its candidates

`seconds` are on the clock, `cpu_seconds` on the processor, which a busy machine does not change much. grown_MiB is what the fresh process grew by.

  python benchmarks/cost.py [--rounds 5]"""
import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from common import machine, write_rows

CASES = {'repvgg_a0': (112, 89), 'mobilenetv2_100': (224, 1000), 'vit_large_patch16_224': (224, 1000)}


def counted(name, size, classes):
    from aaai_lt.hardware.cost import cost
    return int(cost(name, size, classes).macs.sum())


def by_torch(name, size, classes):
    from torch.utils.flop_counter import FlopCounterMode

    from aaai_lt.models.zoo import make_model
    model = make_model(name, classes, input_size=size).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


def timed(function, *arguments):
    "Seconds on the clock and on the processor, and the result."
    clock, processor = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return time.perf_counter() - clock, time.process_time() - processor, result


def fresh(kind, name):
    "Seconds, MiB and result of one call in a process of its own, imports done before."
    import aaai_lt.hardware.cost
    import aaai_lt.models.zoo
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, cpu, macs = timed({'first': counted, 'flop_counter': by_torch}[kind], name, *CASES[name])
    print(json.dumps([seconds, cpu, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, macs]))


def measure(rounds):
    from aaai_lt.hardware.fit import search_fit
    rows, common = [], {'threads': torch.get_num_threads(), 'machine': machine()}
    def add(kind, name, times, mib=None, macs=None):
        seconds, cpu, *_ = zip(*times)
        rows.append({'kind': kind, 'model': name, 'seconds': round(float(np.median(seconds)), 3), 'lowest': round(min(seconds), 3), 'highest': round(max(seconds), 3), 'cpu_seconds': round(float(np.median(cpu)), 3), 'rounds': len(times), 'grown_MiB': mib, 'macs': macs} | common)
    for name, case in CASES.items():
        macs = counted(name, *case)
        add('cost', name, [timed(counted, name, *case) for _ in range(rounds)], macs=macs)
        for kind in ('first', 'flop_counter'):
            results = [json.loads(subprocess.run([sys.executable, __file__, '--fresh', kind, name], capture_output=True, text=True, check=True).stdout) for _ in range(min(rounds, 3))]
            add(kind, name, results, round(max(r[2] for r in results)), results[0][3])
    candidates = len(search_fit(1024))
    add('search', f'{candidates} candidates', [timed(search_fit, 1024) for _ in range(rounds)])
    return rows


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--fresh', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fresh: fresh(*args.fresh)
    else: print(write_rows('cost.csv', measure(args.rounds), ['kind', 'model']).drop(columns='machine').to_string())
