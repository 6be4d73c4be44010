"""What `train_vsa.py`, `precompute_latents.py` and `vsa_evidence.py` share."""
