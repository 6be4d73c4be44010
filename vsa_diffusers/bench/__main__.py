"""`python -m vsa_diffusers.bench` is `vsa-diffusers bench`."""

import sys

from ..cli.app import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
