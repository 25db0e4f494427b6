"""``quantize``: a finished run's merged model in integers, with its error per layer and what it costs on the task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qlora_exp.cli.arguments import OutputRoot, Run, examples, outputs_of
from qlora_exp.formatting import bytes_text

if TYPE_CHECKING:
    from qlora_exp.ptq.quantize_run import Change, QuantizationResults

WORST_LAYERS = 5


def add_to(app: typer.Typer) -> None:
    app.command(
        "quantize",
        epilog=examples(
            "qlora-exp quantize last",
            "qlora-exp quantize last --bits 8,4,3 --group tensor,channel,64 --calibration minmax",
            "qlora-exp quantize last --bits 4 --asymmetric --explain layers.0.mlp.down_proj",
        ),
    )(quantize_command)


def quantize_command(
    run: Run,
    bits: Annotated[str | None, typer.Option(metavar="LIST", help="Bits of a code, e.g. 8,4,3")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Without or with a zero point; default: both")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Weights that share a scale: tensor, channel, or a number, e.g. 64"),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="How ranges are chosen: minmax, mse, or activations (AWQ)")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Training rows whose inputs the layers see")] = None,
    items: Annotated[int | None, typer.Option(help="Number of items that are scored before and after")] = None,
    explain: Annotated[
        str | None, typer.Option(metavar="LAYER", help="Show the arithmetic of one group of this layer instead")
    ] = None,
    index: Annotated[int, typer.Option(help="With --explain: which group")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print quantization.json")] = False,
    output_root: OutputRoot = None,
) -> int:
    """Quantize a run's merged model in integers, and show the error by layer and what it costs on the task.

    Every combination of bits, symmetry and group is tried. The defaults are in conf/ptq.yaml.
    """
    from qlora_exp.config.enums import DeviceChoice
    from qlora_exp.records.find import find_run
    from qlora_exp.runs.process import hide_other_gpus, set_threads, silence_libraries

    hide_other_gpus(DeviceChoice.auto)
    set_threads(None)
    silence_libraries()
    paths = find_run(run, outputs_of(output_root))
    from qlora_exp.ptq.ptq_config import load_ptq_config

    settings = load_ptq_config(
        {
            "bits": _listed(bits),
            "symmetric": None if symmetric is None else [symmetric],
            "groups": _listed(group),
            "calibration": calibration,
            "rows": rows,
            "items": items,
        }
    )
    if explain is not None:
        from qlora_exp.ptq.explain import explain_layer

        for line in explain_layer(paths, settings, explain, index):
            print(line)
        return 0
    from qlora_exp.ptq.quantize_run import quantize_run
    from qlora_exp.runs.console import ProgressReporter

    with ProgressReporter() as observer:
        quantization, file = quantize_run(paths, settings, observer.phase, observer.note)
    if as_json:
        print(file.read_text(encoding="utf-8"), end="")
        return 0
    for line in _lines(quantization):
        print(line)
    print(f"quantization: {file}")
    return 0


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _lines(quantization: QuantizationResults) -> list[str]:
    lines = [
        f"merged model of {quantization.run_id} in 16 bits: {bytes_text(quantization.merged_bytes)}",
        f"{quantization.not_quantized_share:.0%} of the weights (embeddings, norms, head) stay in 16 bits",
    ]
    if quantization.why_not_scored is not None:
        lines.append(f"not scored: {quantization.why_not_scored}")
    else:
        loss = quantization.results[0].loss_per_item
        merged = f", merged {loss.before:.3f}" if loss is not None else ""
        lines += [
            f"loss per item as trained (on {quantization.trained_against}) "
            f"{quantization.trained_loss_per_item:.3f}{merged} nats",
            f"changes against the merged model on {quantization.items} {quantization.split} items, with 95 % intervals "
            "over items alone",
        ]
    header = f"{'format':18}{'bits':>5}{'size':>9}{'weight':>7}{'output':>7}  {'loss per item, nats':27}{'accuracy'}"
    lines += ["", header]
    for result in quantization.results:
        layers = result.layers
        outputs = [layer.output_error for layer in layers if layer.output_error is not None]
        output = f"{sum(outputs) / len(outputs):7.3f}" if outputs else f"{'–':>7}"
        weight = sum(layer.weight_error for layer in layers) / len(layers)
        lines.append(
            f"{result.format:18}{result.bits_per_weight:5.2f}{bytes_text(result.model_bytes):>9}{weight:7.3f}{output}"
            f"  {_change(result.loss_per_item):27}{_change(result.accuracy)}".rstrip()
        )
    worst = quantization.results[-1]
    by_error = sorted(worst.layers, key=lambda layer: -(layer.output_error or layer.weight_error))
    lines += ["", f"worst layers of {worst.format} (errors are relative: 0.1 is 10 %)"]
    lines.append(f"{'layer':36}{'scale':>22}{'zero point':>12}{'clipped':>9}{'weight':>8}{'output':>8}")
    for layer in by_error[:WORST_LAYERS]:
        zero = "–" if layer.zero_point_low is None else f"{layer.zero_point_low} to {layer.zero_point_high}"
        output = "–" if layer.output_error is None else f"{layer.output_error:.4f}"
        lines.append(
            f"{layer.name[-35:]:36}{f'{layer.scale_low:.3g} to {layer.scale_high:.3g}':>22}{zero:>12}"
            f"{layer.clipped_share:9.2%}{layer.weight_error:8.4f}{output:>8}"
        )
    return lines


def _change(change: Change | None) -> str:
    if change is None:
        return "–"
    if change.low is None or change.high is None:
        return f"{change.difference:+.3f}"
    return f"{change.difference:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
