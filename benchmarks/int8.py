"""What int8 costs finished runs: each quantised per tensor and per channel, as it is and equalised, with every calibration, judged on held-out images; rows to results/int8.csv.

  python benchmarks/int8.py gtsrb-whole-0 gtsrb-whole-1 gtsrb-whole-2 [--images 512] [--split val] [--rounds 20]

The runs are those under outputs/ of $AAAI_LT_HOME, of any model: RepVGG beside RepOpt, say. Calibration sees training images only. Latency of int8
over float is measured in onnxruntime in the same process, in turns, as processor time on one thread."""
import argparse
import tempfile
from pathlib import Path

from common import machine, write_rows

from aaai_lt.hardware.latency import Candidate, measure_latency
from aaai_lt.hardware.quantize import METHODS, calibrate, calibration_rows, equalised, float_file, image_batches, input_form, int8_report, layer_errors, predict_onnx, prepare_float, quantise
from aaai_lt.training.evaluate import run_data, run_model
from aaai_lt.models.repvgg import deploy_form
from aaai_lt.training.run import load_run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('runs', nargs='+')
parser.add_argument('--images', type=int, default=512)
parser.add_argument('--split', default='val')
parser.add_argument('--rounds', type=int, default=20)
args = parser.parse_args()

for name in args.runs:
    run = load_run(name)
    data, rows = run_data(run, progress=False), []
    file, part, chosen = float_file(run, data.table), data.splits[args.split], calibration_rows(data, args.images)
    form, plain, network = input_form(file), prepare_float(file), deploy_form(run_model(run))
    def batches(rows): return image_batches(data, rows, run.data, form)
    before, few = predict_onnx(file, batches(part.rows)), list(batches(chosen[:128]))
    for method, equal in [(m, e) for m in METHODS for e in (False, True)]:
        model = equalised(plain) if equal else plain
        ranges = calibrate(model, batches(chosen), method)
        for per_channel in (False, True):
            int8 = quantise(model, ranges, per_channel)
            report = int8_report(before, predict_onnx(int8, batches(part.rows)), part.labels, data.table.classes, data.class_counts).set_index('name')
            worst = layer_errors(model, ranges, few, per_channel).iloc[0]
            with tempfile.TemporaryDirectory() as folder:
                (stored := Path(folder)/'int8.onnx').write_bytes(int8.SerializeToString())
                times = measure_latency([Candidate(name, network, run.data['input_size'], file, stored)], ('onnxruntime', 'onnxruntime int8'), (1, 64), args.rounds).set_index(['backend', 'batch'])
            balanced, accuracy = report.loc['balanced_accuracy'], report.loc['accuracy']
            rows.append({'run': run.name, 'model': run.config.model, 'seed': run.config.seed, 'weights': 'per channel' if per_channel else 'per tensor', 'equalised': equal, 'calibration': method, 'calibration_images': len(chosen), 'split': args.split, 'images': len(part),
                         'balanced_float': round(balanced.float, 5), 'balanced_int8': round(balanced.int8, 5), 'points': round(100 * balanced.change, 3), 'accuracy_float': round(accuracy.float, 5), 'accuracy_int8': round(accuracy.int8, 5), 'agreement': round(accuracy.agreement, 5),
                         'worst_layer': worst.layer, 'worst_error': round(worst.error, 4), **{f'{what}_batch_{batch}': round(float(times.loc[('onnxruntime int8', batch), column]), 3) for batch in (1, 64) for what, column in (('ratio', 'ratio'), ('cpu_ms', 'cpu_ms'))},
                         'float_kb': file.stat().st_size // 1000, 'int8_kb': len(int8.SerializeToString()) // 1000, 'input_size': run.data['input_size'], 'threads': 1, 'machine': machine()})
            print(f'{run.name}, {rows[-1]["weights"]}{", equalised" if equal else ""}, {method}: balanced accuracy {balanced.float:.2%} -> {balanced.int8:.2%}, {accuracy.agreement:.2%} equal decisions, time ratio {rows[-1]["ratio_batch_1"]} (batch 1), {rows[-1]["ratio_batch_64"]} (batch 64)', flush=True)
    table = write_rows('int8.csv', rows, ['run', 'model', 'split', 'calibration_images', 'weights', 'equalised', 'calibration', 'machine'])
print(table[table.run.isin(args.runs)].groupby(['model', 'weights', 'equalised', 'calibration'])[['balanced_float', 'balanced_int8', 'points', 'agreement', 'ratio_batch_1', 'ratio_batch_64']].agg(['mean', 'std', 'count']).round(4).to_string())
