"""``loss.png``: the loss of every step, smoothed too, and how far the values have moved; drawn by matplotlib."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

from svft_diffusion.files.training_folder import METRICS_FILE
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.training.metrics import read_metrics

PLOT_FILE = "loss.png"


def draw_loss(output_dir: Path) -> str:
    """Draw ``loss.png`` from ``metrics.jsonl``; what to tell the user, if anything.

    Raises:
        UserError: the file can't be written.
    """
    rows = read_metrics(output_dir / METRICS_FILE)
    if not rows:
        return ""
    if importlib.util.find_spec("matplotlib") is None:
        return f"no {PLOT_FILE}: it needs matplotlib (pip install 'svft-diffusion[plots]')"
    from matplotlib.figure import Figure  # the optional extra `plots`; no window and no global state

    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(steps, [row["loss"] for row in rows], color="lightsteelblue", linewidth=0.8, label="of each step")
    upper.plot(steps, [row.get("smoothed_loss") for row in rows], color="tab:blue", label="smoothed")
    upper.set_ylabel("loss")
    upper.legend(loc="upper right")
    lower.plot(steps, [row.get("value_norm") for row in rows], color="tab:orange")
    lower.set_ylabel("norm of the trained values")
    lower.set_xlabel("step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    with replace_when_whole(output_dir / PLOT_FILE) as unfinished:
        unfinished.write_bytes(picture.getvalue())
    return ""
