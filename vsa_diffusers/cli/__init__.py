"""The command line, `vsa-diffusers`: one module a command."""
