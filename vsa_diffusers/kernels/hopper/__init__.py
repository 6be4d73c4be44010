"""The forward of the sparse branch for Hopper, in Gluon."""
