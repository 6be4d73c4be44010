"""`python -m vsa_diffusers.bench`: Video Sparse Attention beside dense attention on this machine."""
