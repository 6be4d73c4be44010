"""What the scripts that make videos share: their options, and how they load, time and write."""
