"""What `train_vsa.py` and `precompute_latents.py` share."""
