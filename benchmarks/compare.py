"""Losses for long tails beside each other: the same split, network, budget and seeds; rows to results/compare.csv after every run.

  python benchmarks/compare.py digits
  python benchmarks/compare.py tinyimagenet-lt --data ../shared/data/tinyimagenet-lt [--minutes 60]
  python benchmarks/compare.py gtsrb-lt --data ../shared/data/gtsrb [--seeds 0] [--variants cross_entropy balanced_softmax]
  python benchmarks/compare.py gtsrb-lt --data ../shared/data/gtsrb --smoke    one epoch of the first variant; writes no rows

A run that is finished is read, one that was stopped goes on, so the script may be stopped and started at will. Runs go seed by seed:
what there is after any of them is a fair comparison of fewer seeds. Everything below was written down before the first run.

Budget. One thread, at most three minutes of processor time a run, 2.5 hours in all for the two picture sets. A RepVGG of 0.7 M parameters
(blocks 1, 2, 2, 1; half the widths) at 48 px; AdamW, lr 0.002, weight decay 0.05, batch 128, one epoch of warm-up, cosine.
tinyimagenet-lt: 10,847 images of 100 classes, 500 to 5 each; 10 epochs; judged on its test split, 4,000 images, 40 a class. gtsrb-lt: 6,045
images of 43 classes, 541 to 8 each, whole pictures; 16 epochs; judged on its validation split, 2,640 images, by track. digits: 40 epochs of
light augmentation, lr 0.001, else the default job as it then was (its settings were pinned here when the default changed). The weights of
the last epoch are judged: nothing is chosen on any split, and nothing (learning rate, options of a loss) was tuned for any loss; each has the
defaults of its paper as the library has them. logit_adjustment with tau 1 is balanced_softmax to the bit and is left out; the adjustment
afterwards is its own variant, made from cross-entropy's predictions. All thirteen settings were run on the digits, 5 seeds; on the two picture
sets the eight of FIRST, 3 seeds, since thirteen do not fit the 2.5 hours (soft_eql has one seed on gtsrb-lt). `seconds` are those of the clock,
some of them on a busy machine; `cpu_seconds`, where noted, those of the processor.

Expected order of balanced accuracy.
  better than cross_entropy: balanced_softmax, post_hoc_adjustment, seesaw, ldam, eql, soft_eql, and (less) class_balanced. The first two
    remove the prior exactly and should be on top, near each other; balanced_softmax a little ahead, since the network is trained for it.
  about equal: focal (it follows difficulty, not frequency), label_aware_smoothing (it is made for the second of two stages).
  not better, perhaps worse: gce and symmetric (they distrust rare, badly fitted images, which is right for wrong labels and wrong here).
  unsure: eqlv2. Its weights start at 1 for all classes and its sigmoids without a prior in the bias, so a short run may end before the
    weights have done their work; over a full training it should be among the better.
Whatever helps the few should cost the many something; accuracy over images should hardly gain on gtsrb-lt, whose validation split is
long-tailed itself, and be equal to balanced accuracy on tinyimagenet-lt, whose test split is not."""
import argparse
import time

import numpy as np
import pandas as pd
import torch
from common import RESULTS, machine, write_rows

from aaai_lt.analysis.comparison import compare, comparison_table, plan_comparison, result_rows, run_comparison
from aaai_lt.data.longtail import BANDS, bands
from aaai_lt.training.checkpoint import load_checkpoint
from aaai_lt.training.evaluate import adjust_run
from aaai_lt.training.kinds import KINDS
from aaai_lt.training.run import Run, run_folder

VARIANTS = {'cross_entropy': {}, 'balanced_softmax': {}, 'post_hoc_adjustment': {'loss': 'cross_entropy'}, 'eqlv2': {}, 'focal': {}, 'class_balanced': {}, 'ldam': {}, 'seesaw': {},
            'eql': {}, 'soft_eql': {}, 'label_aware_smoothing': {}, 'gce': {}, 'symmetric': {}}
VARIANTS = {name: {'loss': name} | settings for name, settings in VARIANTS.items()}
SMALL = {'model': 'repvgg_s0', 'model_options': {'blocks': [1, 2, 2, 1], 'widths': [0.5, 0.5, 0.5, 0.5]}, 'input_size': 48, 'batch_size': 128, 'optimizer': 'adamw', 'lr': 2e-3, 'weight_decay': 0.05, 'warmup_epochs': 1.0, 'select': 'last'}
FIRST = list(VARIANTS)[:8]
AFTERWARDS = 'post_hoc_adjustment'  # of the cross-entropy runs
PLANS = {  # settings, seeds, the split on which they are judged
    'tinyimagenet-lt': (SMALL | {'epochs': 10}, [0, 1, 2], 'test'),
    'gtsrb-lt': (SMALL | {'epochs': 16, 'where': "lt == 1 or split == 'val'", 'augment_options': {'hflip': 0}}, [0, 1, 2], 'val'),
    'digits': ({'data': 'digits', 'augment_options': {'hflip': 0.0, 'rotate': 10.0}, 'epochs': 40, 'lr': 1e-3}, [0, 1, 2, 3, 4], 'test'),
}
LIMIT = 180  # seconds of processor time a run, preparing the data included

def adjusted_row(run, split):
    "What changes in a row if the prior is taken out of the predictions afterwards; that needs no training of its own."
    said = adjust_run(run, run.predictions(split), 1.0)
    table = KINDS[False].judge(torch.from_numpy(said.targets), torch.from_numpy(said.scores), said.classes, np.array(run.data['class_counts']), run.data['not_held_out'].get(split, ()))
    return {'variant': AFTERWARDS} | KINDS[False].summarise(table, torch.from_numpy(said.targets), torch.from_numpy(said.scores))


def gradient_ratios(run):
    "What EQL v2's collector says at the end of a run: positive over negative gradient, mean of the classes of each band."
    _, tensors, _ = load_checkpoint(run.folder/'checkpoint')
    ratios = (tensors['loss.pos_grad'] / tensors['loss.neg_grad']).numpy()
    return {f'ratio_{band}': round(float(ratios[of].mean()), 4) for band in BANDS if (of := bands(run.data['class_counts']) == band).any()}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=PLANS)
    parser.add_argument('--data', default='')
    parser.add_argument('--variants', nargs='*', choices=VARIANTS, metavar='VARIANT', help=', '.join(VARIANTS))
    parser.add_argument('--seeds', type=int, nargs='*')
    parser.add_argument('--minutes', type=float, default=150.0, help='start no further run after so many')
    parser.add_argument('--smoke', action='store_true')
    args = parser.parse_args()

    torch.set_num_threads(1)
    settings, seeds, split = PLANS[args.what]
    if args.data: settings = settings | {'data': args.data}
    elif 'data' not in settings: parser.error(f'{args.what} needs --data')
    known = {name: VARIANTS[name] for name in args.variants or (VARIANTS if args.what == 'digits' else FIRST)}
    if args.smoke: known, args.seeds, settings = dict(list(known.items())[:1]), [0], settings | {'epochs': 1, 'warmup_epochs': 0.5}

    plan, began = plan_comparison({name: settings for name, settings in known.items() if name != AFTERWARDS}, args.seeds or seeds, **settings, device='cpu'), time.time()
    for i, (key, config) in enumerate(plan.items(), 1):
        if time.time() - began > 60 * args.minutes: print(f'{args.minutes:g} minutes are over: {len(plan) - i + 1} of {len(plan)} runs are left; the same command goes on'); break
        spent, trained = time.process_time(), not Run(run_folder(config)).finished
        runs = run_comparison({key: config}, say=lambda text: print(f'{i} of {len(plan)}{text.partition(" of 1")[2]}', flush=True))
        spent = round(time.process_time() - spent, 1) if trained else None
        if trained and spent > LIMIT: print(f'longer than {LIMIT} s: {spent:.0f} s')
        rows = [result_rows(runs, split).drop(columns='quick').iloc[0].to_dict()]
        if config.loss == 'eqlv2': rows[0] |= gradient_ratios(runs[key])
        if key[0] == 'cross_entropy' and AFTERWARDS in known: rows.append(rows[0] | adjusted_row(runs[key], split))
        facts = {'model': config.model, 'input_size': config.input_size, 'threads': torch.get_num_threads(), 'machine': machine(), 'cpu_seconds': spent}
        if not args.smoke: write_rows('compare.csv', [{'benchmark': args.what} | row | facts for row in rows], ['benchmark', 'variant', 'seed'])
    if not args.smoke:
        rows = pd.read_csv(RESULTS/'compare.csv')
        rows = rows[rows.benchmark == args.what]
        rows = rows.assign(variant=pd.Categorical(rows.variant, [v for v in VARIANTS if v in set(rows.variant)])).sort_values(['variant', 'seed']).astype({'variant': str})
        if len(set(rows.data)) > 1: print('careful: these rows come from different data')
        if 'cross_entropy' in set(rows.variant): print(comparison_table(compare(rows, 'cross_entropy')).to_string())
