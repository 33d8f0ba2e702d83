"""Time of each loss beside cross-entropy, forward and backward, interleaved in one process; rows to results/losses.csv.

  python benchmarks/losses.py [--classes 5000] [--rows 512] [--rounds 15]

One round times every loss once, in an order of its own, beside a cross-entropy, which goes first in one round and second in the next:
`ratio` is the median over the rounds of (this loss) / (its cross-entropy), with the quartiles as its spread. On a CPU it is processor time
of the process, which other jobs on the machine hardly touch; on a GPU it is time by the clock. `soft` targets are mixed from two classes."""
import argparse
import time

import numpy as np
import torch
from common import machine, write_rows
from torch.nn import functional as F

from aaai_lt.core import ConfigError
from aaai_lt.losses.factory import LOSSES, make_loss
from aaai_lt.losses.margins import MarginLoss, adaptive_margins

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--classes', type=int, default=5000)
parser.add_argument('--rows', type=int, default=512)
parser.add_argument('--rounds', type=int, default=15)
args = parser.parse_args()
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
clock = time.perf_counter if device.type == 'cuda' else time.process_time
generator = torch.Generator().manual_seed(0)
counts = (5121 * 640 ** (-torch.arange(args.classes) / args.classes)).long()
logits = (4 * torch.randn(args.rows, args.classes, generator=generator)).to(device).requires_grad_()
hard = torch.multinomial(counts.double(), args.rows, replacement=True, generator=generator).to(device)
one_hot = F.one_hot(hard, args.classes).float()
targets = {'hard': hard, 'soft': 0.7 * one_hot + 0.3 * one_hot.flip(0)}
STATEFUL = {'eqlv2', 'soft_eql', 'seesaw'}  # sums over the batch are part of the loss


def seconds(loss, target):
    logits.grad = None
    if device.type == 'cuda': torch.cuda.synchronize()
    began = clock()
    loss(logits, target).backward()
    if device.type == 'cuda': torch.cuda.synchronize()
    return clock() - began


losses = {name: make_loss(name, counts).to(device) for name in LOSSES if not getattr(LOSSES[name], 'multilabel', False)}
losses['arcface + cross_entropy'] = MarginLoss(make_loss('cross_entropy', counts), adaptive_margins(counts)).to(device)
losses['arcface + soft_eql'] = MarginLoss(make_loss('soft_eql', counts), adaptive_margins(counts)).to(device)
plain, rows = make_loss('cross_entropy', counts).to(device), []
cases = []
for name in losses:
    for kind, target in targets.items():
        try: seconds(losses[name], target)
        except ConfigError: continue  # class indices only
        cases.append((name, kind))
times = {case: [] for case in cases}
for round_ in range(args.rounds + 2):  # the first two warm up
    for i in np.random.default_rng(round_).permutation(len(cases)):
        name, kind = cases[i]
        pair = [seconds(loss, targets[kind]) for loss in (plain, losses[name])[::1 if round_ % 2 else -1]][::1 if round_ % 2 else -1]
        if round_ >= 2: times[cases[i]].append(pair)
for (name, kind), pairs in times.items():
    one, other = np.array(pairs).T
    low, ratio, high = np.quantile(other / one, [0.25, 0.5, 0.75])
    rows.append({'loss': name, 'target': kind, 'keeps_sums': any(part in STATEFUL for part in name.split(' + ')), 'ms': round(1e3 * np.median(other), 2), 'cross_entropy_ms': round(1e3 * np.median(one), 2),
                 'ratio': round(ratio, 2), 'lower_quartile': round(low, 2), 'upper_quartile': round(high, 2), 'rounds': args.rounds, 'classes': args.classes, 'rows': args.rows, 'threads': torch.get_num_threads(), 'machine': machine()})
table = write_rows('losses.csv', rows, ['machine', 'classes', 'rows', 'target', 'loss'])
print(table[table.machine == machine()].drop(columns='machine').to_string(index=False))
