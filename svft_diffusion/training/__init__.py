"""DreamBooth training of adapters: settings, the loop, checkpoints, samples and the model card."""
