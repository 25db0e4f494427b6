"""Writes torchao_reference.json: scales, zero points and codes of a small matrix as torchao computes them.

``pip install torchao; python tests/ptq/write_torchao_reference.py``. torchao is no dependency of this project.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torchao
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

ROWS, COLUMNS, GROUP = 6, 32, 16
SMALLEST_SCALE = 6.104e-05


def main() -> None:
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS) * torch.rand(ROWS, 1) * 0.1
    formats = []
    for bits in (8, 4, 3):
        for symmetric in (True, False):
            low, high = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
            mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
            for granularity, block in (("tensor", (ROWS, COLUMNS)), ("channel", (1, COLUMNS)), (GROUP, (1, GROUP))):
                scale, zero_point = choose_qparams_affine(
                    *(weight, mapping, block, torch.int32, low, high),
                    scale_dtype=torch.float16,
                    zero_point_dtype=torch.int32,
                    eps=SMALLEST_SCALE,
                )
                codes = quantize_affine(weight, block, scale.float(), zero_point, torch.int32, low, high)
                formats.append(
                    {
                        "bits": bits,
                        "symmetric": symmetric,
                        "granularity": granularity,
                        "scale": scale.float().flatten().tolist(),
                        "zero_point": zero_point.flatten().tolist(),
                        "codes": codes.flatten().tolist(),
                    }
                )
    content = {"torchao": torchao.__version__, "weight": weight.tolist(), "formats": formats}
    file = Path(__file__).with_name("torchao_reference.json")
    file.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    main()
