"""How the embedded model was made: five stages that anybody can run again.

``render`` draws the world, ``autoencoder`` trains the VAE on it, ``latents`` encodes it, ``denoiser`` trains UNet and
text encoder together, ``readers`` trains the encoders that judge pictures; ``export`` writes the pipeline folder and
``certify`` measures it. Each stage is bounded in time, keeps its state in the work folder and goes on where it stopped:

    python -m svft_diffusion.toybox.pretraining render --work_dir runs/toybox
"""
