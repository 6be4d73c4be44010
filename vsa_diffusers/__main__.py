"""`python -m vsa_diffusers` is `vsa-diffusers`."""

from .cli.app import main

if __name__ == "__main__":
    main()
