"""What a training step with an adapter costs, against LoRA, DoRA and the published code; see docs/benchmarks.md."""
