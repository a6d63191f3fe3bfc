"""Draws an adapter at rising weight, from Python: python samples/sampling/sample.py ADAPTER OUTPUT_DIR."""

import sys
from pathlib import Path

from svft_diffusion.sampling.adapter_sets import AdapterEntry, AdapterSets
from svft_diffusion.sampling.adapter_use import parse_use
from svft_diffusion.sampling.sample import SamplingConfig, sample

if __name__ == "__main__":
    adapter, output_dir = sys.argv[1:]
    result = sample(
        SamplingConfig(
            pretrained_model_name_or_path="toybox",
            prompt=["a photo of {token} {class} on the beach"],
            num_inference_steps=[10],
            num_images=2,
            output_dir=Path(output_dir),
        ),
        AdapterSets(
            entries=[AdapterEntry(Path(adapter), name="subject")],
            sets={
                "whole": {"subject": parse_use(1.0)},
                "ramp": {"subject": parse_use({"weight": 1.0, "schedule": {"ramp_in": 0.5}})},
            },
        ),
    )
    print(result.index)
