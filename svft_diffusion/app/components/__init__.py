"""Controls that Gradio does not bring along, each with its script in `assets`."""
