"""Latency of models in every backend that runs here, measured in turns; rows to results/latency.csv.

  python benchmarks/latency.py [repvgg_n1 repvgg_a0 resnet18 …] [--input_size 112] [--batches 1 64] [--rounds 20] [--threads 1] [--backends torch onnxruntime …]

A model is a name, or a finished run under outputs/ of $AAAI_LT_HOME."""
import argparse
import tempfile

from common import machine, write_rows

from aaai_lt.hardware.latency import BACKENDS, candidate, measure_latency

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('models', nargs='*', default=['repvgg_n1', 'repvgg_n2', 'repvgg_m0', 'repvgg_a0'])
parser.add_argument('--input_size', type=int, default=112)
parser.add_argument('--num_classes', type=int, default=89)
parser.add_argument('--batches', type=int, nargs='*', default=[1, 64])
parser.add_argument('--rounds', type=int, default=20)
parser.add_argument('--threads', type=int, default=1)
parser.add_argument('--backends', nargs='*', default=list(BACKENDS))
args = parser.parse_args()

for model in args.models:  # one after the other: its backends take turns, and memory holds one model
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_latency([candidate(model, folder, args.input_size, args.num_classes)], tuple(args.backends), tuple(args.batches), args.rounds, threads=args.threads)
    table = write_rows('latency.csv', rows.round(4).assign(machine=machine()).to_dict('records'), ['machine', 'threads', 'model', 'input_size', 'batch', 'backend'])
    print(rows.drop(columns=['input_size', 'warmup', 'threads']).round(3).to_string(index=False), flush=True)
